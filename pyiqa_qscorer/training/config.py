"""Training configuration: one YAML file, typed and validated; the published recipe is the default.

pydantic does the checking, so that a wrong key or value is refused with its place in the file. Settings of libraries
have the names that the libraries give them: transformers' `TrainingArguments`, peft's `LoraConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ..data.settings import Section, check_settings, read_yaml
from ..registry import BACKBONES
from .dataset_config import DatasetConfig, PyiqaDataset

CONFIG_FOLDER = Path(__file__).with_name("configs")


class DataConfig(Section):
    """Images with opinions; every scale is mapped to 1 (worst) .. 5 (best)."""

    train: list[DatasetConfig] = Field(min_length=1, description="datasets to train on")
    validation: list[DatasetConfig] = Field([], description="datasets that choose the best state")
    data_root: Path = Field(Path("datasets"), description="folder of pyiqa's datasets")
    on_error: Literal["stop", "skip"] = Field("stop", description="what an unusable row or broken image does")
    allow_overlap: bool = Field(False, description="let training and validation share images")
    flip: bool = Field(False, description="mirror half of the training images, another half each epoch")
    cache_statistics: bool = Field(
        False, description="compute what a frozen feature network gives once; needs trainable.vision_backbone: false"
    )
    statistics: Path | None = Field(None, description="folder of these; default: in the output folder")

    @model_validator(mode="before")
    @classmethod
    def _root_of_every_part(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "data_root" not in content:
            return content
        filled = {
            name: [
                {"data_root": content["data_root"], **part} if isinstance(part, dict) and "dataset" in part else part
                for part in content[name]
            ]
            for name in ("train", "validation")
            if isinstance(content.get(name), list)
        }
        return {**content, **filled}

    @model_validator(mode="after")
    def _parts_fit(self) -> DataConfig:
        parts = (*self.train, *self.validation)
        if "data_root" in self.model_fields_set and not any(isinstance(part, PyiqaDataset) for part in parts):
            raise ValueError("data_root goes with datasets that are given by name (dataset: koniq10k), and none is")
        if any(part.weight != 1 for part in self.validation):
            raise ValueError("weight goes with training datasets: every validation image counts once")
        return self


class ModelConfig(Section):
    """Where the weights start, and what they are to say."""

    checkpoint: str | None = Field(
        None,
        description="metric name (qscorer-mini), Hub id or folder: a base (mPLUG-Owl2), or anything that scores, in "
        "any layout",
    )
    backbone: str | None = Field(
        None,
        description="instead of checkpoint: any image-text-to-text model of transformers: a Hub id, a folder, or "
        + ", ".join(BACKBONES),
    )
    processor: dict[str, Any] = Field(
        {}, description="of a backbone: changed settings of its image processor, such as max_pixels"
    )
    base: str | None = Field(None, description="Hub id or folder of the model under a LoRA checkpoint")
    revision: str | None = Field(None, description="branch, tag or commit of the checkpoint")
    base_revision: str | None = Field(None, description="branch, tag or commit of the base")
    architecture: dict[str, Any] | None = Field(
        None, description="instead of checkpoint: fields of `QScorerConfig` of a new network with random weights"
    )
    vision: dict[str, Any] | None = Field(
        None,
        description="changes of the vision_config of a checkpoint with a feature network: more stages (the weights of "
        "new ones come from backbone_weights, and count for nothing at first), image_fit, smallest_side",
    )
    backbone_weights: list[str] = Field(
        [],
        description="of a new network's feature network: files, or installed packages with one; a later one goes over "
        "those before it",
    )
    tokenizer: Path | None = Field(None, description="folder, for a new network; default: a small one of ours")
    formulation: Literal["score_token", "level_onehot", "level_soft"] = Field(
        "score_token", description="how the quality is told: Q-Scorer, Q-Align, DeQA-Score"
    )
    levels: int = Field(5, ge=1, description="number of score tokens or level words")
    level_words: list[str] = Field(["bad", "poor", "fair", "good", "excellent"], description="lowest quality first")
    regressor: Literal["mlp", "hyper"] = Field("mlp", description="see `QScorerConfig`")
    regressor_hidden_sizes: list[int] | None = Field(None, description="default: the checkpoint's")
    prompts: list[str] = Field(["training"], min_length=1, description="question variants; scoring uses the first")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention code")
    gradient_checkpointing: bool = Field(True, description="less memory, more time")

    @model_validator(mode="after")
    def _one_start(self) -> ModelConfig:
        if sum(start is not None for start in (self.checkpoint, self.architecture, self.backbone)) != 1:
            raise ValueError("give either checkpoint, architecture or backbone")
        if self.processor and self.backbone is None:
            raise ValueError("processor goes with backbone: other networks take pictures of one size")
        if self.vision is not None and self.checkpoint is None:
            raise ValueError("vision changes a checkpoint: write it into architecture.vision_config")
        if self.backbone_weights and self.architecture is None and self.vision is None:
            raise ValueError("backbone_weights go with architecture, or with vision: a checkpoint has its own")
        if self.formulation != "score_token" and len(self.level_words) != self.levels:
            raise ValueError(f"level_words must be {self.levels} words, got {self.level_words}")
        return self


class ObjectiveConfig(Section):
    """Weights of the parts; the total is `scale` times their weighted sum. Published: 0.05 x (CE + MSE)."""

    scale: float = Field(0.05, gt=0, description="of the total")
    cross_entropy: float = Field(1.0, ge=0, description="of the answer's tokens")
    score: float = Field(1.0, ge=0, description="squared error of the regressed score")
    clamp_score: bool = Field(True, description="published: no gradient from scores predicted outside [0, 5]")
    soft_label_kl: float | None = Field(None, ge=0, description="default: 1 in the level_soft formulation, else 0")
    fidelity: float = Field(0.0, ge=0, description="preferences between two images, with their spreads")
    norm_in_norm: float = Field(0.0, ge=0, description="distance of normalised scores")
    pairwise_ranking: float = Field(0.0, ge=0, description="hinge on the order of two images")
    ranking_margin: float = Field(0.1, ge=0, description="of pairwise_ranking, in units of the score")
    listwise_ranking: float = Field(0.0, ge=0, description="likelihood of the order of the batch")
    plcc: float = Field(0.0, ge=0, description="(1 - Pearson correlation) / 2")

    def weights(self, formulation: str) -> dict[str, float]:
        """Weight of each part that is computed in a formulation, by name; parts of weight 0 are left out."""
        found = self.model_dump(exclude={"scale", "clamp_score", "ranking_margin"})
        if found["soft_label_kl"] is None:
            found["soft_label_kl"] = 1.0 if formulation == "level_soft" else 0.0
        if formulation != "score_token":
            found["score"] = 0.0
        return {name: weight for name, weight in found.items() if weight > 0}

    def needs_std(self, formulation: str) -> bool:
        """Whether a part compares distributions of opinions."""
        return not {"soft_label_kl", "fidelity"}.isdisjoint(self.weights(formulation))


class LoraSettings(Section):
    """Adapters, by peft's names. Default: query projections, and value projections of visual tokens."""

    enabled: bool = Field(True, description="train adapters; not with trainable.everything")
    r: int = Field(128, ge=1, description="rank")
    lora_alpha: int = Field(256, gt=0, description="scale of the update, times 1 / r")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="of the adapters' input")
    target_modules: str = Field(
        r".*\.self_attn\.(q_proj|v_proj\.multiway\.1)",
        description="regular expression of the layers with adapters; default on a backbone: q_proj and v_proj of its "
        "language model",
    )
    modules_to_save: list[str] = Field([], description="of a backbone: modules trained in full, such as its projector")
    quantise_base: Literal["4bit", "8bit"] | None = Field(None, description="QLoRA: the frozen base in fewer bits")


class TrainableSettings(Section):
    """What trains in full besides the adapters."""

    vision_model: bool = Field(True, description="vision encoder")
    visual_abstractor: bool = Field(True, description="with its projection into the language model")
    lm_head: bool = Field(True, description="output rows of the vocabulary")
    regressor: bool = Field(True, description="from the score token's state to the score")
    embed_tokens: bool = Field(False, description="input rows of the vocabulary")
    everything: bool = Field(False, description="full fine-tuning")
    vision_backbone: bool = Field(True, description="false freezes the vision encoder's feature network in any case")
    frozen_stages: int = Field(0, ge=0, description="of the feature network, from its first, that do not train")


class TrainingSettings(Section):
    """Fields of transformers' `TrainingArguments`, with the defaults of the published recipe; any other may be given.

    `average_decay`, `start_share`, `vision_backbone_learning_rate` and the meaning of `save_steps` are ours.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    num_train_epochs: float = Field(3, gt=0, description="epochs")
    max_steps: int = Field(-1, description="steps, instead of epochs, where above 0")
    per_device_train_batch_size: int = Field(16, ge=1, description="images per step and process")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches per step")
    learning_rate: float = Field(2e-5, gt=0, description="at its peak")
    vision_backbone_learning_rate: float | None = Field(None, gt=0, description="of a feature network; default: same")
    lr_scheduler_type: str = Field("cosine", description="how the learning rate falls")
    warmup_steps: float = Field(0.03, ge=0, description="share of the steps below 1, else steps")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    average_decay: float | None = Field(
        None, gt=0, lt=1, description="per step, of averaged weights, which are evaluated and kept; default: none"
    )
    start_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the starting weights in those that are kept at the end, which so keep much of what the "
        "start could (WiSE-FT)",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm")
    bf16: bool = Field(True, description="compute in bfloat16; false and no fp16: float32")
    fp16: bool = Field(False, description="compute in float16; set bf16: false then")
    seed: int = Field(0, description="of everything random")
    save_steps: int | None = Field(None, ge=1, description="a resumable state every so many steps, besides each epoch")
    save_total_limit: int = Field(2, ge=1, description="resumable states kept, the best besides")
    logging_steps: int = Field(10, ge=1, description="steps between two entries of the log")
    load_best_model_at_end: bool = Field(True, description="keep the best state on the validation data, else the last")
    metric_for_best_model: Literal["srcc", "plcc", "krcc"] = Field("srcc", description="what is best")
    dataloader_num_workers: int = Field(4, ge=0, description="processes that read images; 0: none beside the training")
    use_cpu: bool = Field(False, description="train on the CPU though there is a GPU")
    report_to: str = Field("tensorboard", description="where curves go: tensorboard --logdir OUTPUT shows them; none")
    deepspeed: str | None = Field(None, description="file of DeepSpeed's settings")
    fsdp: str | None = Field(None, description="see transformers")
    fsdp_config: str | None = Field(None, description="file of FSDP's settings")

    @model_validator(mode="after")
    def _known_to_transformers(self) -> TrainingSettings:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other: set bf16: false")
        if self.model_extra:
            from transformers import TrainingArguments  # takes a second

            known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
            for key in self.model_extra:
                if key in SET_BY_US:
                    raise ValueError(f"{key} is set by this program: remove it")
                if key not in known:
                    names = sorted({*known, *type(self).model_fields} - SET_BY_US)
                    near = [name for name in names if key in name] or get_close_matches(key, names, n=1)
                    hint = f"did you mean {min(near, key=len)!r}?" if near else "see training/configs/README.md"
                    raise ValueError(f"{key}: unknown key; {hint}")
        return self

    @property
    def precision(self) -> Literal["bfloat16", "float16", "float32"]:
        """What is computed in."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"


OURS = {"average_decay", "start_share", "vision_backbone_learning_rate", "save_steps"}
"""Settings that `TrainingArguments` does not have, or has with another meaning."""
SET_BY_US = {
    *("output_dir", "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "save_strategy", "label_names"),
    *("remove_unused_columns", "greater_is_better", "gradient_checkpointing", "activation_checkpointing"),
    *("logging_nan_inf_filter", "resume_from_checkpoint", "push_to_hub", "ddp_find_unused_parameters"),
}
"""Fields of `TrainingArguments` that other sections or the program decide."""


class TrainConfig(Section):
    """A training run."""

    output: Path = Field(description="folder of the run: resumable states, and the checkpoints that it leaves")
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraSettings = LoraSettings()
    trainable: TrainableSettings = TrainableSettings()
    training: TrainingSettings = TrainingSettings()
    layouts: list[Literal["qscorer", "published", "published_lora"]] = Field(
        ["qscorer"], description="checkpoints to write: ours, a whole model or adapters for the published code"
    )

    @model_validator(mode="after")
    def _settings_fit_together(self) -> TrainConfig:
        training, everything, backbone = self.training, self.trainable.everything, self.model.backbone is not None
        rules = [
            (
                self.model.architecture is not None and not everything,
                "model.architecture makes a network with nothing to keep: set trainable.everything: true",
            ),
            (
                everything and self.lora.enabled and "lora" in self.model_fields_set,
                "trainable.everything trains without adapters: set lora.enabled: false",
            ),
            (
                "published_lora" in self.layouts and (everything or not self.lora.enabled),
                "layout published_lora needs adapters: lora.enabled: true without trainable.everything",
            ),
            (
                training.vision_backbone_learning_rate is not None and not self.trainable.vision_backbone,
                "vision_backbone_learning_rate needs trainable.vision_backbone: true, or nothing learns",
            ),
            (
                training.average_decay is not None and bool(training.deepspeed or training.fsdp),
                "average_decay needs whole parameters: leave out deepspeed and fsdp, which split them",
            ),
            (
                not self.objective.weights(self.model.formulation),
                f"objective has no part with a weight above 0 in formulation {self.model.formulation}",
            ),
            (
                backbone and (not self.lora.enabled or bool(self.trainable.model_fields_set - {"regressor"})),
                "model.backbone trains adapters, rows of new tokens and the regressor: give its other parts by name in "
                "lora.target_modules (adapters) or lora.modules_to_save (in full), not in trainable",
            ),
            (
                bool(self.lora.modules_to_save) and not backbone,
                "lora.modules_to_save goes with model.backbone; for other starts see trainable",
            ),
            (
                backbone and self.layouts != ["qscorer"],
                "model.backbone has only layout qscorer, an adapter folder; `pyiqa-qscorer merge` makes a whole model",
            ),
            (
                backbone and (self.data.cache_statistics or training.vision_backbone_learning_rate is not None),
                "data.cache_statistics and training.vision_backbone_learning_rate need a feature network, no backbone",
            ),
            (
                self.data.cache_statistics and self.trainable.vision_backbone,
                "data.cache_statistics needs trainable.vision_backbone: false",
            ),
        ]
        for broken, message in rules:
            if broken:
                raise ValueError(message)
        return self


def read_config(path: Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read and check a YAML file.

    Args:
        path: the file; a bare name without folder is also looked up among the package's examples.
        overrides: dotted keys and values that go over the file, e.g. `{"training.seed": 1}`.

    Raises:
        TrainingConfigError: unreadable, an unknown key (with the nearest known one), or a value outside its rule; the
            message names the place in the file.
    """
    return parse_config(read_yaml(path, CONFIG_FOLDER, overrides), str(path))


def parse_config(content: Mapping[str, Any], source: str = "configuration") -> TrainConfig:
    """Check an already parsed configuration; errors as `read_config`."""
    return check_settings(TrainConfig, content, source)
