"""Training configuration: examples, defaults as published, and every kind of mistake."""

from pathlib import Path
from typing import Any

import pytest
from settings_reference import settings_reference

from pyiqa_qscorer.errors import TrainingConfigError
from pyiqa_qscorer.training.config import CONFIG_FOLDER, ObjectiveConfig, TrainConfig, parse_config, read_config


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


def test_defaults_and_one_data_root() -> None:
    config = read_config(Path("mixed.yaml"), {"data.data_root": "/data", "data.train.1.data_root": "/other"})
    assert [str(part.data_root) for part in config.data.train] == ["/data", "/other", "/data"]
    assert str(config.data.validation[0].data_root) == "/data"
    config = parse_config(minimal())
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (128, 256, 0.05)
    training = config.training
    assert (training.learning_rate, training.num_train_epochs, training.per_device_train_batch_size) == (2e-5, 3, 16)
    assert (training.lr_scheduler_type, training.warmup_steps, training.weight_decay) == ("cosine", 0.03, 0)
    assert training.precision == "bfloat16" and config.objective.scale == 0.05
    assert config.objective.weights("score_token") == {"cross_entropy": 1.0, "score": 1.0}
    assert config.model.prompts == ["training"]
    given = {"adam_beta2": 0.95, "lr_scheduler_kwargs": {"num_cycles": 2}}  # any field of transformers
    assert parse_config(minimal(training=given)).training.model_extra == given


def test_formulations_choose_their_objective_and_the_reference_is_current() -> None:
    """`python tests/test_training_config.py` writes it."""
    assert (CONFIG_FOLDER / "README.md").read_text() == reference()
    objective = ObjectiveConfig()
    assert objective.weights("level_onehot") == {"cross_entropy": 1.0}
    assert objective.weights("level_soft") == {"cross_entropy": 1.0, "soft_label_kl": 1.0}
    assert objective.needs_std("level_soft") and not objective.needs_std("score_token")
    assert ObjectiveConfig(fidelity=1.0).needs_std("score_token")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainng": {}}, ["trainng", "unknown key", "'training'"]),
        ({"lora": {"rank": 4}}, ["lora.rank", "unknown key"]),
        ({"data": {"train": [{"dataset": "x", "wight": 2}]}}, ["data.train.0.wight", "'weight'"]),
        ({"data": {"train": []}}, ["data.train", "at least 1"]),
        ({"data": {"train": [{"dataset": "x", "weight": 0}]}}, ["data.train.0.weight", "greater than 0", "got 0"]),
        ({"data": {"train": [{"csv": "a.csv"}]}}, ["data.train.0.mos_range", "required"]),
        ({"data": {"train": [{"csv": "a.csv", "dataset": "x"}]}}, ["data.train.0", "either dataset"]),
        ({"data": {"train": [{}]}}, ["data.train.0", "either dataset"]),
        ({"data": {"train": [{"dataset": "x", "mos_range": [5, 1]}]}}, ["low < high"]),
        ({"model": {}}, ["model", "either checkpoint, architecture or backbone"]),
        ({"model": {"checkpoint": "x", "backbone_weights": ["y"]}}, ["model", "backbone_weights go with architecture"]),
        ({"model": {"checkpoint": "a/b", "levels": 0}}, ["model.levels", "got 0"]),
        ({"model": {"checkpoint": "a/b", "formulation": "level_soft", "levels": 3}}, ["level_words must be 3"]),
        ({"model": {"checkpoint": "a/b", "formulation": "words"}}, ["model.formulation", "score_token"]),
        ({"training": {"bf16": True, "fp16": True}}, ["training", "exclude each other"]),
        ({"training": {"save_steps": 0}}, ["training.save_steps", "got 0"]),
        ({"training": {"output_dir": "x"}}, ["output_dir is set by this program"]),
        ({"training": {"adam_beta": 1}}, ["adam_beta: unknown key", "'adam_beta1'"]),
        ({"output": None}, ["output"]),
        ({"model": {"architecture": {}}}, ["nothing to keep", "trainable.everything"]),
        ({"data": {"train": [{"dataset": "x", "std_range": [5, 1]}]}}, ["std_range: must be"]),
        (
            {"data": {"train": [{"dataset": "x"}], "validation": [{"dataset": "x", "weight": 2}]}},
            ["every validation image counts once"],
        ),
        ({"lora": {"r": 8}, "trainable": {"everything": True}}, ["without adapters", "lora.enabled: false"]),
        ({"lora": {"enabled": False}, "layouts": ["published_lora"]}, ["published_lora needs adapters"]),
        (
            {"trainable": {"vision_backbone": False}, "training": {"vision_backbone_learning_rate": 1e-4}},
            ["vision_backbone_learning_rate needs"],
        ),
        (
            {"data": {"train": [{"csv": "a.csv", "folder": "a", "mos_range": [1, 5]}], "data_root": "b"}},
            ["data_root goes with datasets that are given by name"],
        ),
        ({"objective": {"cross_entropy": 0, "score": 0}}, ["no part with a weight above 0"]),
    ],
)
def test_mistakes_are_named_with_their_place(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(TrainingConfigError) as error:
        parse_config(minimal(**changes))
    for word in words:
        assert word in str(error.value)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    for content, words in ((None, "cannot be read"), ("output: [", "cannot be read"), ("- a list", "mapping")):
        if content is not None:
            file.write_text(content)
        with pytest.raises(TrainingConfigError, match=words):
            read_config(file)


def test_overrides_go_over_the_file(tmp_path: Path) -> None:
    config = read_config(Path("tiny.yaml"), {"training.seed": 7, "output": str(tmp_path)})
    assert config.training.seed == 7 and config.output == tmp_path
    with pytest.raises(TrainingConfigError, match="not a section"):
        read_config(Path("tiny.yaml"), {"output.x": 1})
    config = read_config(Path("mini.yaml"), {"data.train.1.weight": 5, "model.prompts.0": "evaluation"})
    assert (config.data.train[1].weight, config.model.prompts) == (5, ["evaluation"])
    for place in ("data.train.2.weight", "data.train.first.weight", "model.prompts.1"):
        with pytest.raises(TrainingConfigError, match=r"is not one of 0\.\."):
            read_config(Path("mini.yaml"), {place: 1})


def reference() -> str:
    """Content of the README beside the examples."""
    return (
        "# Settings of a training\n\nThe examples here are complete configurations; every setting that they leave out "
        "has its default. Made from `training/config.py`.\n\n" + settings_reference(TrainConfig)
    )


if __name__ == "__main__":
    (CONFIG_FOLDER / "README.md").write_text(reference())
