"""Training runs: they learn, resume exactly, survive kills and full disks, and leave checkpoints that load."""

import json
import shutil
from pathlib import Path
from typing import Any

import golden_data
import numpy as np
import pytest
import torch
from tiny_checkpoint import published_folders
from tiny_training import ARCHITECTURE, settings
from train_in_subprocess import run, run_here
from transformers import EvalPrediction

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.checkpoints import load_folder
from pyiqa_qscorer.checkpoints.weights import read_shard
from pyiqa_qscorer.errors import CheckpointError, TrainingFailedError
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import TrainingResult, train
from pyiqa_qscorer.training.trainer import QScorerTrainer, agreement, evaluation_metrics, last_complete_state


@pytest.fixture(scope="module")
def uninterrupted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_here(settings(pictures, tmp_path_factory.mktemp("uninterrupted") / "out"))


@pytest.mark.parametrize(
    "save_steps", [pytest.param(None, marks=pytest.mark.slow), 2], ids=["each_epoch", "in_mid_epoch"]
)
def test_killed_and_resumed_gives_the_same_losses(pictures, tmp_path, uninterrupted, save_steps) -> None:
    content = settings(pictures, tmp_path / "out", training={"save_steps": save_steps})
    assert run(content, tmp_path, KILL_AT_STEP="9")[0] == -9
    # A state that the kill tore must not be taken.
    torn = tmp_path / "out" / "checkpoint-999"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 9')
    state = last_complete_state(tmp_path / "out")
    assert state is not None and state.name == ("checkpoint-6" if save_steps is None else "checkpoint-8")
    shutil.rmtree(torn)
    resumed = run_here(content)
    assert resumed["losses"] == uninterrupted["losses"]
    assert resumed["metrics"]["validation_srcc"] == uninterrupted["metrics"]["validation_srcc"]


def test_sigterm_leaves_a_state_and_resumes(pictures: Path, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    content = settings(pictures, tmp_path / "out")
    assert not run_here(content, STOP_AT_STEP="5")["finished"] and (tmp_path / "out" / "checkpoint-5").is_dir()
    assert not (tmp_path / "out" / "checkpoint_qscorer").exists()
    resumed = run_here(content)
    assert resumed["losses"] == uninterrupted["losses"]
    for measure in ("validation_srcc", "validation_rmse"):  # of the best state, which the stop must not decide
        assert resumed["metrics"][measure] == uninterrupted["metrics"][measure]


@pytest.mark.slow
def test_two_processes_equal_one(pictures: Path, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    content = settings(pictures, tmp_path / "out")
    content["training"]["per_device_train_batch_size"] //= 2
    status, together = run(content, tmp_path, processes=2)
    assert status == 0, together
    assert together["losses"].keys() == uninterrupted["losses"].keys()
    for step, loss in uninterrupted["losses"].items():
        assert together["losses"][step] == pytest.approx(loss, rel=2e-2), step
    rmse = uninterrupted["metrics"]["validation_rmse"]
    assert together["metrics"]["validation_rmse"] == pytest.approx(rmse, rel=2e-2)


def test_it_learns_and_leaves_a_metric(pictures: Path, tmp_path: Path) -> None:
    content = settings(pictures, tmp_path / "out", training={"num_train_epochs": 30, "logging_steps": 10})
    result = train(parse_config(content))
    folder = result.folders["qscorer"]
    assert result.metrics["validation_srcc"] > 0.9
    scorer = Scorer("qscorer", "cpu", checkpoint=folder)
    assert scorer.metric.dtype == torch.float32
    files = sorted(pictures.glob("*.png"))
    seen = [index for index in range(len(files)) if index % 4 != 3]
    scores = scorer.score([files[index] for index in seen])
    assert agreement(scores, np.array(seen))["srcc"] > 0.95
    facts = json.loads((folder / "training.json").read_text())
    assert facts["data"]["train"][0] == facts["data"]["train"][0] | {"mos_range": [0, 100], "images": 18}
    assert facts["curves"] and "torch" in facts["versions"]
    assert "| labels | train | 18 | 0 | 0 to 100 | no | 1 |" in (folder / "README.md").read_text()
    network = load_folder(folder).model.config
    assert network.prompt == "training" and network.training_data["train"][0]["dataset"] == "labels"


EVERY_OBJECTIVE = ("soft_label_kl", "fidelity", "norm_in_norm", "plcc", "pairwise_ranking", "listwise_ranking")


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ({"formulation": "level_onehot"}, {}),
        ({"formulation": "level_soft"}, {}),
        ({"levels": 1}, {}),
        ({"levels": 7, "regressor": "hyper", "regressor_hidden_sizes": [8, 4]}, {}),
        ({"prompts": ["training", "score"]}, dict.fromkeys(EVERY_OBJECTIVE, 1.0)),
    ],
    ids=["level_onehot", "level_soft", "one_token", "hyper_7_tokens", "all_objectives_two_prompts"],
)
def test_every_formulation_trains_saves_and_scores(pictures, tmp_path, model, objective) -> None:
    model = {"architecture": ARCHITECTURE, "gradient_checkpointing": False, **model}
    sections = {"model": model, "objective": objective, "training": {"num_train_epochs": 1}, "data": {"flip": True}}
    content = settings(pictures, tmp_path / "out", **sections)
    config = parse_config(content)
    result = train(config)
    facts = json.loads((result.folders["qscorer"] / "training.json").read_text())
    first = next(entry for entry in facts["curves"] if "loss" in entry)
    weights = config.objective.weights(config.model.formulation)
    assert weights.keys() <= first.keys()
    assert first["loss"] == pytest.approx(sum(weights[name] * first[name] for name in weights), rel=1e-3)
    scores = Scorer("qscorer", "cpu", checkpoint=result.folders["qscorer"]).score(sorted(pictures.glob("*.png"))[:3])
    assert np.isfinite(scores).all()
    network = load_folder(result.folders["qscorer"]).model.config
    assert (network.formulation, network.regressor) == (config.model.formulation, config.model.regressor)


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], TrainingResult]:
    """A run of one epoch, and its result; tests leave its folder as it is."""
    content = settings(pictures, tmp_path_factory.mktemp("finished") / "out", training={"num_train_epochs": 1})
    return content, train(parse_config(content))


def test_gradient_checkpointing_changes_nothing(finished, tmp_path) -> None:
    model = {**finished[0]["model"], "gradient_checkpointing": True}
    config = parse_config({**finished[0], "model": model, "output": str(tmp_path / "out")})
    folders = [result.folders["qscorer"] for result in (finished[1], train(config))]
    curves = [json.loads((folder / "training.json").read_text())["curves"] for folder in folders]
    plain, checkpointed = ([entry["loss"] for entry in one if "loss" in entry] for one in curves)
    assert plain == pytest.approx(checkpointed, rel=1e-5)


@pytest.fixture(scope="module")
def lora_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A published-recipe run on the golden base: the base folder and the written checkpoints."""
    folder = tmp_path_factory.mktemp("lora")
    _, base, _ = published_folders(folder)
    sections = {
        "model": {"checkpoint": str(base), "architecture": None, "regressor_hidden_sizes": [8, 8, 6]},
        "objective": {"scale": 0.05, "clamp_score": True},
        "lora": {"enabled": True, "r": 4, "lora_alpha": 8},
        "training": {"num_train_epochs": 1, "learning_rate": 1e-3, "bf16": True},
        "layouts": ["qscorer", "published", "published_lora"],
    }
    content = settings(pictures, folder / "out", **sections, trainable={"everything": False})
    return base, train(parse_config(content)).folders


def test_lora_layout_is_the_published_one(lora_run: tuple[Path, dict[str, Path]]) -> None:
    _, folders = lora_run
    published = golden_data.table("lora_golden/layout_keys")
    for name in ("adapter_model.bin", "non_lora_trainables.bin"):
        written = read_shard(folders["published_lora"] / name)
        assert {key: [list(tensor.shape), str(tensor.dtype)] for key, tensor in written} == published[name]
    settings_file = json.loads((folders["published_lora"] / "adapter_config.json").read_text())
    golden = golden_data.table("official_lora_layout/adapter_config")
    for key in ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "peft_type", "task_type"):
        assert settings_file[key] == golden[key]


def test_all_layouts_of_a_run_score_alike(lora_run: tuple[Path, dict[str, Path]], pictures: Path) -> None:
    base, folders = lora_run
    photos = sorted(pictures.glob("*.png"))[:4]

    def scores(folder: Path, **options: Any) -> np.ndarray:
        return Scorer("qscorer", "cpu", checkpoint=folder, dtype="float32", prompt="training", **options).score(photos)

    merged = scores(folders["qscorer"])
    assert merged == pytest.approx(scores(folders["published"]), abs=1e-6)
    assert merged == pytest.approx(scores(folders["published_lora"], base=base), abs=0.02)  # bfloat16 against float16


def test_adapters_and_chosen_parts_have_moved_and_nothing_else(lora_run: tuple[Path, dict[str, Path]]) -> None:
    base, folders = lora_run
    before = {name: tensor for shard in sorted(base.glob("*.bin")) for name, tensor in read_shard(shard)}
    after = dict(read_shard(folders["published"] / "model.safetensors"))
    trained = ("vision_model.", "visual_abstractor.", "lm_head.", ".q_proj.", ".v_proj.multiway.1.")
    for name, tensor in before.items():
        rows = len(tensor) if tensor.ndim else 0
        moved = not torch.equal(after[name][:rows].to(tensor.dtype), tensor)
        if not any(part in name for part in trained) or name.endswith("pos_embed"):
            assert not moved, name
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert not torch.equal(after[name][: len(before[name])], before[name])


def test_going_on_from_a_scoring_checkpoint(lora_run, pictures, tmp_path) -> None:
    model = {"checkpoint": str(lora_run[1]["qscorer"]), "architecture": None}
    content = settings(pictures, tmp_path / "out", model=model, training={"num_train_epochs": 1})
    assert train(parse_config(content)).finished
    content = settings(pictures, tmp_path / "other", model={**model, "formulation": "level_onehot"})
    with pytest.raises(CheckpointError, match=r"trained with .*score_token.*asks for .*level_onehot"):
        train(parse_config(content))


def test_another_configuration_does_not_go_on_with_a_run_nor_a_new_one_over_it(finished) -> None:
    content, _ = finished
    changed = {**content, "training": {**content["training"], "learning_rate": 1e-4, "logging_steps": 7}}
    with pytest.raises(TrainingFailedError, match=r"training\.learning_rate was 0\.002 and is 0\.0001") as error:
        train(parse_config(changed))
    assert "logging_steps" not in str(error.value)
    with pytest.raises(TrainingFailedError, match="resume it, or use a new folder"):
        train(parse_config(content), resume=False)


def test_a_finished_run_is_not_run_again_and_writes_what_is_missing(finished, monkeypatch) -> None:
    config, first = parse_config(finished[0]), finished[1]
    folder = first.folders["qscorer"]
    weights = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)  # as if the process had been killed before it wrote this
    assert train(config).metrics["validation_rmse"] == pytest.approx(first.metrics["validation_rmse"])
    assert (folder / "model.safetensors").read_bytes() == weights
    monkeypatch.setattr("pyiqa_qscorer.training.run.starting_point", lambda config: pytest.fail("loaded a model"))
    again = train(config)
    assert again.finished and again.folders == first.folders
    assert again.metrics["validation_rmse"] == pytest.approx(first.metrics["validation_rmse"])


def test_what_cannot_be_written_and_a_quantised_base_without_a_gpu_are_refused(pictures: Path, tmp_path: Path) -> None:
    content = settings(pictures, tmp_path / "out")
    (tmp_path / "out" / "checkpoint_qscorer").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint_qscorer" / "somebody.txt").write_text("else's")
    with pytest.raises(CheckpointError, match="new or empty folder"):
        train(parse_config(content))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        train(parse_config({**settings(pictures, tmp_path / "other"), "layouts": ["published"]}))
    assert last_complete_state(tmp_path / "out") is None and last_complete_state(tmp_path / "other") is None
    (tmp_path / "file").touch()
    with pytest.raises(TrainingFailedError, match="choose another folder"):
        train(parse_config(settings(pictures, tmp_path / "file" / "out")))
    _, base, _ = published_folders(tmp_path / "published")
    model, lora = {"checkpoint": str(base), "architecture": None}, {"enabled": True, "quantise_base": "4bit"}
    content = settings(pictures, tmp_path / "out", model=model, lora=lora, trainable={"everything": False})
    with pytest.raises(TrainingFailedError, match="needs a CUDA GPU"):
        train(parse_config(content))


def test_progress_shows_and_the_state_at_the_end_of_an_epoch_knows_its_evaluation(pictures, tmp_path, capfd) -> None:
    training = {"num_train_epochs": 2, "save_steps": 3, "save_total_limit": 5}
    train(parse_config(settings(pictures, tmp_path / "out", training=training)))  # three steps per epoch
    shown = "".join(capfd.readouterr())
    assert "epoch 1, validation: SRCC" in shown and "cross_entropy=" in shown and "train_srcc=" in shown
    for step in (3, 6):
        state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert any("eval_srcc" in entry and entry["step"] == step for entry in state["log_history"])


def test_datasets_count_by_themselves() -> None:
    """Two datasets whose scales do not compare: ranked together they would look bad."""
    scores = np.array([1.0, 2.0, 3.0, 1.1, 2.1, 3.1])
    labels = np.array([[1.0, 0], [2.0, 0], [3.0, 0], [3.0, 1], [4.0, 1], [5.0, 1]])
    found = evaluation_metrics(["first", "second"], EvalPrediction(scores, labels))
    assert [found[name] for name in ("srcc", "srcc_0_first", "srcc_1_second")] == pytest.approx([1, 1, 1])
    assert found["rmse"] == pytest.approx((0 + 1.9) / 2) and agreement(scores, labels[:, 0])["srcc"] < 0.9
    for scores in ([1.0, 1.0, 1.0], [2.0]):  # no correlation
        found = agreement(np.array(scores), np.arange(len(scores)))
        assert (found["srcc"], found["plcc"], found["krcc"]) == (0, 0, 0) and np.isfinite(found["rmse"])


def test_out_of_memory_says_which_knobs(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(QScorerTrainer, "compute_loss", too_large)
    with pytest.raises(TrainingFailedError, match=r"batch_size.*gradient_checkpointing.*quantise_base"):
        train(parse_config(settings(pictures, tmp_path / "out")))


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"learning_rate": 1e30}, r"the loss is (nan|inf).*learning_rate"),
        # Beyond float32; no log comes before the first state is due.
        (
            {"learning_rate": 1e39, "logging_steps": 50, "save_steps": 2},
            r"not finite any more at step 2 .*learning_rate",
        ),
    ],
)
def test_what_is_not_finite_stops_and_is_not_kept(pictures, tmp_path, training, words) -> None:
    with pytest.raises(TrainingFailedError, match=words):
        train(parse_config(settings(pictures, tmp_path / "out", training=training)))
    assert "save_steps" not in training or last_complete_state(tmp_path / "out") is None


def test_lora_folder_is_whole_where_only_adapters_train(pictures: Path, tmp_path: Path) -> None:
    _, base, _ = published_folders(tmp_path / "published")
    content = settings(
        pictures,
        tmp_path / "out",
        model={"checkpoint": str(base), "architecture": None, "regressor_hidden_sizes": [8, 8, 6]},
        lora={"enabled": True, "r": 4, "lora_alpha": 8},
        trainable=dict.fromkeys(("everything", "vision_model", "visual_abstractor", "lm_head", "regressor"), False),
        training={"num_train_epochs": 1},
        layouts=["published_lora"],
    )
    folder = train(parse_config(content)).folders["published_lora"]
    loaded = load_folder(folder, base, dtype="float32")  # strict: every key must have come
    assert loaded.model.config.regressor_hidden_sizes == [8, 8, 6]
