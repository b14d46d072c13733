"""Training configuration: one YAML file, typed and validated; the published recipe is the default.

pydantic does the checking, so that a wrong key or value is refused with its place in the file.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import TrainingConfigError

CONFIG_FOLDER = Path(__file__).with_name("configs")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatasetConfig(_Section):
    """One dataset: a pyiqa name with `data_root`; an own `folder` and `csv` with its `mos_range`; or `synthetic`.

    `synthetic` distorts `count` times a photo of the folders `photos` (below the run's `photos`), by the types and
    levels of KADID-10k (`kadid`) or by realistic chains (`chains`): see `training/synthetic.py`.
    """

    dataset: str | None = None
    name: str | None = None  # in reports; default: the dataset's, the CSV file's, or what it is rendered from
    data_root: Path = Path("datasets")  # where not given, that of the data section
    download: bool = False  # let pyiqa fetch a missing dataset
    split: str | int | None = None  # pyiqa's split column or index; None: the dataset's default
    folder: Path | None = None
    csv: Path | None = None
    file_column: str | None = None
    mos_column: str | None = None
    std_column: str | None = None
    split_column: str | None = None
    mos_range: tuple[float, float] | None = None
    std_range: tuple[float, float] | None = None  # scale of the standard deviations where it is another
    lower_better: bool = False
    weight: float = Field(1.0, gt=0)
    synthetic: Literal["kadid", "chains"] | None = None
    photos: list[Path] = []
    count: int = Field(1000, ge=1)
    type_shares: dict[int, float] = {}  # of KADID types against the others, 1 where not named
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_kind(self) -> DatasetConfig:
        if [self.dataset, self.csv, self.synthetic].count(None) != 2:
            raise ValueError(
                "give either dataset (a pyiqa name), csv with folder and mos_range, or synthetic with photos"
            )
        if (self.synthetic is None) != (not self.photos):
            raise ValueError("synthetic needs photos (folders of undistorted pictures), and photos needs synthetic")
        if self.csv is not None and (self.folder is None or self.mos_range is None):
            raise ValueError("csv needs folder (where the images are) and mos_range (the scale of the MOS)")
        if self.mos_range is not None and not self.mos_range[0] < self.mos_range[1]:
            raise ValueError(f"mos_range must be [low, high] with low < high, got {self.mos_range}")
        if self.std_range is not None and not self.std_range[0] < self.std_range[1]:
            raise ValueError(f"std_range must be [low, high] with low < high, got {self.std_range}")
        if self.synthetic is None and {"count", "seed"} & self.model_fields_set:
            raise ValueError("count and seed go with synthetic")
        if self.synthetic != "kadid" and self.type_shares:
            raise ValueError("type_shares goes with synthetic: kadid")
        if any(share < 0 for share in self.type_shares.values()):
            raise ValueError(f"type_shares must be >= 0, got {self.type_shares}")
        return self


class DataConfig(_Section):
    train: list[DatasetConfig] = Field(min_length=1)
    validation: list[DatasetConfig] = []
    data_root: Path = Path("datasets")  # folder of pyiqa's datasets
    on_error: Literal["stop", "skip"] = "stop"
    allow_overlap: bool = False  # of training and validation images
    flip: bool = False
    workers: int = Field(4, ge=0)
    photos: Path = Path()  # what the photos of synthetic datasets are below
    rendered: Path | None = None  # folder of rendered datasets and cached statistics; None: in the output folder
    render_workers: int = Field(2, ge=1)
    cache_statistics: bool = False  # of a frozen feature network, computed once; needs trainable.vision_backbone: false

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
    def _folders_are_used(self) -> DataConfig:
        if "data_root" in self.model_fields_set and all(
            part.dataset is None for part in (*self.train, *self.validation)
        ):
            raise ValueError("data_root goes with datasets that are given by name (dataset: koniq10k), and none is")
        if "photos" in self.model_fields_set and not self.synthetic:
            raise ValueError("photos goes with synthetic datasets, and none is")
        return self

    @property
    def synthetic(self) -> bool:
        """Whether any of the data is rendered from photos."""
        return any(part.synthetic is not None for part in (*self.train, *self.validation))


class ModelConfig(_Section):
    """Where the weights start, and what they are to say.

    `checkpoint` is a base (mPLUG-Owl2), or anything that scores, in any layout. `architecture` instead builds a new
    network with these fields of `QScorerConfig` and random weights; `tokenizer` is a folder then, or None for the
    small one that knows the prompts.
    """

    checkpoint: str | None = None
    base: str | None = None
    revision: str | None = None
    base_revision: str | None = None
    architecture: dict[str, Any] | None = None
    backbone_weights: str | None = None  # of a new network's feature network: a file, or an installed package with one
    tokenizer: Path | None = None
    formulation: Literal["score_token", "level_onehot", "level_soft"] = "score_token"
    levels: int = Field(5, ge=1)
    level_words: list[str] = ["bad", "poor", "fair", "good", "excellent"]
    regressor: Literal["mlp", "hyper"] = "mlp"
    regressor_hidden_sizes: list[int] | None = None
    prompts: list[str] = Field(["training"], min_length=1)  # question variants; scoring uses the first
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = True

    @model_validator(mode="after")
    def _one_start(self) -> ModelConfig:
        if (self.checkpoint is None) == (self.architecture is None):
            raise ValueError("give either checkpoint or architecture")
        if self.formulation != "score_token" and len(self.level_words) != self.levels:
            raise ValueError(f"level_words must be {self.levels} words, got {self.level_words}")
        return self


class ObjectiveConfig(_Section):
    """Weights of the parts; the total is `scale` times their weighted sum. Published: 0.05 x (CE + MSE)."""

    scale: float = Field(0.05, gt=0)
    cross_entropy: float = Field(1.0, ge=0)
    score: float = Field(1.0, ge=0)
    clamp_score: bool = True  # published: no gradient from scores predicted outside [0, 5]
    soft_label_kl: float | None = Field(None, ge=0)  # None: 1 in the level_soft formulation, else 0
    fidelity: float = Field(0.0, ge=0)
    norm_in_norm: float = Field(0.0, ge=0)
    pairwise_ranking: float = Field(0.0, ge=0)
    ranking_margin: float = Field(0.1, ge=0)
    listwise_ranking: float = Field(0.0, ge=0)
    plcc: float = Field(0.0, ge=0)

    def weights(self, formulation: str) -> dict[str, float]:
        """Weight of each part that is computed in a formulation, by name; parts of weight 0 are left out."""
        soft_label_kl = self.soft_label_kl
        if soft_label_kl is None:
            soft_label_kl = 1.0 if formulation == "level_soft" else 0.0
        weights = {
            "cross_entropy": self.cross_entropy,
            "score": self.score if formulation == "score_token" else 0.0,
            "soft_label_kl": soft_label_kl,
            "fidelity": self.fidelity,
            "norm_in_norm": self.norm_in_norm,
            "pairwise_ranking": self.pairwise_ranking,
            "listwise_ranking": self.listwise_ranking,
            "plcc": self.plcc,
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def needs_std(self, formulation: str) -> bool:
        """Whether a part compares distributions of opinions."""
        return not {"soft_label_kl", "fidelity"}.isdisjoint(self.weights(formulation))


class LoraSettings(_Section):
    """Published defaults: query projections, and value projections of visual tokens."""

    enabled: bool = True
    r: int = Field(128, ge=1)
    alpha: float = Field(256, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: str = r".*\.self_attn\.(q_proj|v_proj\.multiway\.1)"
    quantise_base: Literal["4bit", "8bit"] | None = None  # QLoRA


class TrainableSettings(_Section):
    """What trains in full besides the adapters. `everything` is full fine-tuning."""

    vision_model: bool = True
    visual_abstractor: bool = True
    lm_head: bool = True
    regressor: bool = True
    embed_tokens: bool = False
    everything: bool = False
    vision_backbone: bool = True  # False freezes the feature network within the vision encoder, whatever else trains


class OptimisationConfig(_Section):
    epochs: float = Field(3, gt=0)
    max_steps: int = -1
    batch_size: int = Field(16, ge=1)  # per process
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(2e-5, gt=0)
    vision_backbone_learning_rate: float | None = Field(None, gt=0)  # of a pretrained feature network; None: the same
    schedule: str = "cosine"
    warmup: float = Field(0.03, ge=0)  # share of the steps below 1, else steps
    weight_decay: float = Field(0.0, ge=0)
    average_decay: float | None = Field(None, gt=0, lt=1)  # per step, of averaged weights, which are kept; None: none
    max_gradient_norm: float = Field(1.0, ge=0)
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    seed: int = 0
    save_steps: int | None = Field(None, ge=1)  # besides each epoch
    log_steps: int = Field(10, ge=1)
    keep: int = Field(2, ge=1)  # resumable states kept
    best_by: Literal["srcc", "plcc", "krcc"] = "srcc"
    deepspeed: Path | None = None
    fsdp: str | None = None
    fsdp_settings: Path | None = None


class TrainConfig(_Section):
    """Whole configuration of a training run."""

    output: Path
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraSettings = LoraSettings()
    trainable: TrainableSettings = TrainableSettings()
    optimisation: OptimisationConfig = OptimisationConfig()
    layouts: list[Literal["qscorer", "published", "published_lora"]] = ["qscorer"]
    device: Literal["auto", "cpu"] = "auto"

    @model_validator(mode="after")
    def _settings_fit_together(self) -> TrainConfig:
        if self.model.architecture is not None and not self.trainable.everything:
            raise ValueError("model.architecture makes a network with nothing to keep: set trainable.everything: true")
        if self.trainable.everything and self.lora.enabled and "lora" in self.model_fields_set:
            raise ValueError("trainable.everything trains without adapters: set lora.enabled: false")
        if "published_lora" in self.layouts and (self.trainable.everything or not self.lora.enabled):
            raise ValueError("layout published_lora needs adapters: lora.enabled: true without trainable.everything")
        if self.optimisation.vision_backbone_learning_rate is not None and not self.trainable.vision_backbone:
            raise ValueError("vision_backbone_learning_rate needs trainable.vision_backbone: true, or nothing learns")
        if self.optimisation.average_decay is not None and (self.optimisation.deepspeed or self.optimisation.fsdp):
            raise ValueError("average_decay needs whole parameters: leave out deepspeed and fsdp, which split them")
        if not self.objective.weights(self.model.formulation):
            raise ValueError(f"objective has no part with a weight above 0 in formulation {self.model.formulation}")
        if any(part.weight != 1 for part in self.data.validation):
            raise ValueError("weight goes with training datasets: every validation image counts once")
        if self.data.cache_statistics and (self.trainable.vision_backbone or self.data.flip):
            raise ValueError("data.cache_statistics needs trainable.vision_backbone: false and data.flip: false")
        return self


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Read and check a YAML file.

    Args:
        path: the file; a bare name without folder is also looked up among the package's examples.
        overrides: dotted keys and values that go over the file, e.g. `{"optimisation.seed": 1}`.

    Raises:
        TrainingConfigError: unreadable, an unknown key (with the nearest known one), or a value outside its rule; the
            message names the place in the file.
    """
    file = path if path.exists() or path.parent != Path() else CONFIG_FOLDER / path
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise TrainingConfigError(f"configuration {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TrainingConfigError(f"configuration {path} must be a mapping of sections, got {type(content).__name__}")
    for dotted, value in (overrides or {}).items():
        _set(content, dotted.split("."), value)
    return parse_config(content, str(path))


def parse_config(content: dict[str, Any], source: str = "configuration") -> TrainConfig:
    """Check an already parsed configuration; errors as `read_config`."""
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        lines = [f"  {_place(item['loc'])}: {_reason(item)}" for item in error.errors()]
        raise TrainingConfigError(f"{source} has {len(lines)} problem(s):\n" + "\n".join(lines)) from error


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "top level"


def _reason(item: Any) -> str:
    if item["type"] != "extra_forbidden":
        shown = "" if item["type"] == "missing" else f", got {item['input']!r}"
        return f"{item['msg']}{shown}"
    *section, key = (part for part in item["loc"] if isinstance(part, str))
    known = _fields_of(section)
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key; {hint}"


def _fields_of(section: list[str]) -> list[str]:
    """Field names of the section at a path of keys."""
    model: Any = TrainConfig
    for key in section:
        annotation = model.model_fields[key].annotation
        model = next((arg for arg in getattr(annotation, "__args__", ()) if hasattr(arg, "model_fields")), annotation)
    return list(model.model_fields)


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    """Put a value at a path of keys; a number is the position in a list, from 0."""
    *parents, last = keys
    inner: Any = content
    for key in parents:
        inner = _entry(inner, key, keys)
    if isinstance(inner, list):
        _entry(inner, last, keys)
        inner[int(last)] = value
    else:
        inner[last] = value


def _entry(section: Any, key: str, keys: list[str]) -> Any:
    if isinstance(section, list):
        if not key.isdecimal() or int(key) >= len(section):
            raise TrainingConfigError(f"override {'.'.join(keys)}: {key} is not one of 0..{len(section) - 1}")
        return section[int(key)]
    found = section.setdefault(key, {})
    if not isinstance(found, (dict, list)):
        raise TrainingConfigError(f"override {'.'.join(keys)}: {key} is not a section")
    return found
