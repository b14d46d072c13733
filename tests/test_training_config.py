"""Training configuration: examples, defaults as published, and every kind of mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_training import settings

from pyiqa_qscorer.errors import TrainingConfigError
from pyiqa_qscorer.training.config import CONFIG_FOLDER, ObjectiveConfig, parse_config, read_config


def minimal(**changes: Any) -> dict[str, Any]:
    return {
        "output": "out",
        "model": {"checkpoint": "owner/name"},
        "data": {"train": [{"dataset": "koniq10k"}]},
        **changes,
    }


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid_and_found_by_name(path: Path) -> None:
    assert read_config(Path(path.name)) == read_config(path)


def test_one_data_root_serves_all_parts() -> None:
    config = read_config(Path("mixed.yaml"), {"data.data_root": "/data", "data.train.1.data_root": "/other"})
    assert [str(part.data_root) for part in config.data.train] == ["/data", "/other", "/data"]
    assert str(config.data.validation[0].data_root) == "/data"


def test_there_are_examples() -> None:
    assert {path.stem for path in CONFIG_FOLDER.glob("*.yaml")} >= {"koniq", "mixed", "qlora_24gb", "mini"}


def test_defaults_are_the_published_recipe() -> None:
    config = parse_config(minimal())
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (128, 256, 0.05)
    optimisation = config.optimisation
    assert (optimisation.learning_rate, optimisation.epochs, optimisation.batch_size) == (2e-5, 3, 16)
    assert (optimisation.schedule, optimisation.warmup, optimisation.weight_decay) == ("cosine", 0.03, 0)
    assert config.objective.scale == 0.05
    assert config.objective.weights("score_token") == {"cross_entropy": 1.0, "score": 1.0}
    assert config.model.prompts == ["training"]


def test_formulations_choose_their_objective() -> None:
    objective = ObjectiveConfig()
    assert objective.weights("level_onehot") == {"cross_entropy": 1.0}
    assert objective.weights("level_soft") == {"cross_entropy": 1.0, "soft_label_kl": 1.0}
    assert objective.needs_std("level_soft")
    assert not objective.needs_std("score_token")
    assert ObjectiveConfig(fidelity=1.0).needs_std("score_token")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimisaton": {}}, ["optimisaton", "unknown key", "'optimisation'"]),
        ({"lora": {"rank": 4}}, ["lora.rank", "unknown key"]),
        ({"data": {"train": [{"dataset": "x", "wight": 2}]}}, ["data.train.0.wight", "'weight'"]),
        ({"data": {"train": []}}, ["data.train", "at least 1"]),
        ({"data": {"train": [{"dataset": "x", "weight": 0}]}}, ["data.train.0.weight", "greater than 0", "got 0"]),
        ({"data": {"train": [{"csv": "a.csv"}]}}, ["data.train.0", "folder", "mos_range"]),
        ({"data": {"train": [{}]}}, ["data.train.0", "either dataset"]),
        ({"data": {"train": [{"dataset": "x", "mos_range": [5, 1]}]}}, ["low < high"]),
        ({"model": {}}, ["model", "either checkpoint or architecture"]),
        ({"model": {"checkpoint": "a/b", "levels": 0}}, ["model.levels", "got 0"]),
        ({"model": {"checkpoint": "a/b", "formulation": "level_soft", "levels": 3}}, ["level_words must be 3"]),
        ({"model": {"checkpoint": "a/b", "formulation": "words"}}, ["model.formulation", "score_token"]),
        ({"optimisation": {"precision": "int8"}}, ["optimisation.precision", "bfloat16"]),
        ({"optimisation": {"save_steps": 0}}, ["optimisation.save_steps", "got 0"]),
        ({"output": None}, ["output"]),
        ({"model": {"architecture": {}}}, ["nothing to keep", "trainable.everything"]),
        ({"data": {"train": [{"dataset": "x", "count": 5}]}}, ["data.train.0", "go with synthetic"]),
        ({"data": {"train": [{"dataset": "x", "type_shares": {1: 2}}]}}, ["type_shares goes with synthetic: kadid"]),
        (
            {"data": {"train": [{"synthetic": "kadid", "photos": ["a"], "type_shares": {1: -1}}]}},
            ["type_shares must be >= 0"],
        ),
        ({"data": {"train": [{"dataset": "x", "std_range": [5, 1]}]}}, ["std_range must be"]),
        (
            {"data": {"train": [{"dataset": "x"}], "validation": [{"dataset": "x", "weight": 2}]}},
            ["every validation image counts once"],
        ),
        ({"lora": {"r": 8}, "trainable": {"everything": True}}, ["without adapters", "lora.enabled: false"]),
        ({"lora": {"enabled": False}, "layouts": ["published_lora"]}, ["published_lora needs adapters"]),
        (
            {"trainable": {"vision_backbone": False}, "optimisation": {"vision_backbone_learning_rate": 1e-4}},
            ["vision_backbone_learning_rate needs"],
        ),
        (
            {"data": {"train": [{"csv": "a.csv", "folder": "a", "mos_range": [1, 5]}], "data_root": "b"}},
            ["data_root goes with datasets that are given by name"],
        ),
        ({"data": {"train": [{"dataset": "x"}], "photos": "b"}}, ["photos goes with synthetic"]),
        ({"objective": {"cross_entropy": 0, "score": 0}}, ["no part with a weight above 0"]),
    ],
)
def test_mistakes_are_named_with_their_place(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(TrainingConfigError) as error:
        parse_config(minimal(**changes))
    for word in words:
        assert word in str(error.value)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(TrainingConfigError, match="cannot be read"):
        read_config(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("output: [")
    with pytest.raises(TrainingConfigError, match="cannot be read"):
        read_config(broken)
    broken.write_text("- a list")
    with pytest.raises(TrainingConfigError, match="mapping"):
        read_config(broken)


def test_overrides_go_over_the_file(tmp_path: Path) -> None:
    config = read_config(Path("tiny.yaml"), {"optimisation.seed": 7, "output": str(tmp_path)})
    assert config.optimisation.seed == 7
    assert config.output == tmp_path
    with pytest.raises(TrainingConfigError, match="not a section"):
        read_config(Path("tiny.yaml"), {"output.x": 1})
    config = read_config(Path("mini.yaml"), {"data.train.1.count": 5, "model.prompts.0": "evaluation"})
    assert (config.data.train[1].count, config.model.prompts) == (5, ["evaluation"])
    for place in ("data.train.2.count", "data.train.first.count", "model.prompts.1"):
        with pytest.raises(TrainingConfigError, match=r"is not one of 0\.\."):
            read_config(Path("mini.yaml"), {place: 1})


def test_helper_configuration_is_valid(tmp_path: Path) -> None:
    assert parse_config(settings(tmp_path, tmp_path / "out")).optimisation.batch_size == 6
