"""Configuration of the network. Defaults are the sizes of the published 7B model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import get_annotations
from typing import Any

from transformers import PreTrainedConfig

FORMULATIONS = ("score_token", "level_onehot", "level_soft")
REGRESSORS = ("mlp", "hyper")
IMAGE_FITS = ("pad", "mirror")
VISION_KINDS = ("vit", "features")
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size"),
    *("max_position_embeddings", "patch_size", "num_learnable_queries", "grid_size", "smallest_side"),
)
_CONSTANTS = ("rms_norm_eps", "layer_norm_eps", "rope_base")
_NOT_IN_PUBLISHED = ("kind", "backbone", "stages", "image_fit", "smallest_side")  # of a vision encoder
# Fields of the decoder that the published config.json has under the same name.
_SAME_IN_PUBLISHED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "rms_norm_eps", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
)


class _Fields(PreTrainedConfig):
    """Takes the annotated attributes of a class as keywords, which early releases of transformers 5 do not do."""

    def __init__(self, **kwargs: Any) -> None:
        ours = [one for one in reversed(type(self).__mro__) if issubclass(one, _Fields)]  # with derived classes
        names = dict.fromkeys(name for one in ours for name in get_annotations(one))
        own = {name: kwargs.pop(name, getattr(self, name)) for name in names}
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, list(value) if isinstance(value, (list, tuple)) else value)


class QScorerVisionConfig(_Fields):
    """Vision encoder, which turns a square image into one cls and (image_size/patch_size)^2 patch tokens.

    Kind `vit` is the published one, which alone has numbers of layers and heads and an inner width; `features` is a
    convolutional network of timm (`model/features.py`).
    """

    model_type = "qscorer_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    image_fit: str = "pad"  # with the mean colour to a square, as published; `mirror`: by reflection, never enlarged
    smallest_side: int = 1  # pixels of the shorter side below which a loss is refused, and scoring warns
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    kind: str = "vit"
    backbone: str | None = None  # its name in timm
    stages: Sequence[int] = ()  # of it that are read, as timm counts them, lowest first
    image_size: int = 448
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_numbers("vision_config", self)
        kind, backbone, stages, fit = self.kind, self.backbone, self.stages, self.image_fit
        if kind not in VISION_KINDS:
            raise ValueError(f"vision_config: kind must be one of {', '.join(VISION_KINDS)}, got {kind!r}")
        if (kind == "features") != (backbone is not None and bool(stages)):
            raise ValueError(
                f"vision_config: backbone and stages go with kind 'features', got {kind!r} with {backbone!r}, {stages}"
            )
        if fit not in IMAGE_FITS:
            raise ValueError(f"vision_config: image_fit must be one of {', '.join(IMAGE_FITS)}, got {fit!r}")
        if stages != sorted(set(stages)):
            raise ValueError(f"vision_config: stages must be in ascending order, each once, got {stages}")
        if kind == "vit":
            _check_heads("vision_config", self)
        if self.image_size % self.patch_size:
            raise ValueError(
                "vision_config: image_size must be a multiple of patch_size, "
                f"got {self.image_size} and {self.patch_size}"
            )


class QScorerAbstractorConfig(_Fields):
    """Visual abstractor: learned queries that summarise the patch tokens into a few visual tokens."""

    model_type = "qscorer_abstractor"
    base_config_key = "abstractor_config"

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    num_learnable_queries: int = 64
    grid_size: int = 32
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_numbers("abstractor_config", self)
        _check_heads("abstractor_config", self)
        if self.hidden_size % 4:
            raise ValueError(
                f"abstractor_config: hidden_size must be a multiple of 4 for the 2-D sine table, got {self.hidden_size}"
            )


class QScorerConfig(_Fields):
    """Whole network: the decoder's own sizes, the two visual parts, score tokens and regressor.

    The formulation says how the score leaves the decoder. `score_token`: regressed from the state before a score token
    (Q-Scorer). `level_onehot`, `level_soft`: expectation over the probabilities of level tokens, trained with one-hot
    labels (Q-Align) or soft ones (DeQA-Score); kept for comparison.

    The published code keeps the same facts under other names (`deepmlp_hidden_dims`, `score_token_id` from highest
    to lowest, nested `visual_config`); `from_published` and `to_published` translate.
    """

    model_type = "qscorer"
    sub_configs = {"vision_config": QScorerVisionConfig, "abstractor_config": QScorerAbstractorConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (unannotated: neither is a field)

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    vocab_size: int = 32005
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_base: float = 10000.0  # not "rope_theta": transformers moves that name elsewhere
    initializer_range: float = 0.02
    regressor_hidden_sizes: Sequence[int] = (2048, 1024)
    score_tokens: Sequence[str] = ()  # added tokens, lowest quality first, e.g. `<score1>`..`<score5>`
    score_token_ids: Sequence[int] = ()
    formulation: str = "score_token"
    level_tokens: Sequence[str] = ()  # words, lowest quality first
    level_token_ids: Sequence[int] = ()
    regressor: str = "mlp"  # published; `hyper`: its weights come from the visual tokens (HyperIQA's idea)
    prompt: str = "score"  # a name of `prompt.PROMPTS`, or a text with one image placeholder

    def __init__(
        self,
        vision_config: QScorerVisionConfig | dict[str, Any] | None = None,
        abstractor_config: QScorerAbstractorConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Set before super().__init__, which walks the sub-configurations (attention implementation).
        self.vision_config = _sub_config(QScorerVisionConfig, vision_config)
        self.abstractor_config = _sub_config(QScorerAbstractorConfig, abstractor_config)
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
        self.num_key_value_heads = self.num_attention_heads  # the published decoder has no grouped heads
        _check_numbers("config", self)
        _check_heads("config", self)
        vision, abstractor = self.vision_config, self.abstractor_config
        if vision.hidden_size != abstractor.hidden_size:
            raise ValueError(
                "abstractor_config.hidden_size must equal vision_config.hidden_size, "
                f"got {abstractor.hidden_size} and {vision.hidden_size}"
            )
        if vision.image_size // vision.patch_size != abstractor.grid_size:
            raise ValueError(
                f"abstractor_config.grid_size must be image_size / patch_size of the vision encoder, "
                f"got {abstractor.grid_size} and {vision.image_size} / {vision.patch_size}"
            )
        for kind in ("score", "level"):
            tokens, ids = getattr(self, f"{kind}_tokens"), getattr(self, f"{kind}_token_ids")
            if len(tokens) != len(ids):
                raise ValueError(
                    f"{kind}_tokens and {kind}_token_ids must have the same length, got {tokens} and {ids}"
                )
        for name, choices in (("formulation", FORMULATIONS), ("regressor", REGRESSORS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @property
    def quality_token_ids(self) -> Sequence[int]:
        """Ids of the tokens that tell the quality in this formulation, lowest quality first."""
        return self.score_token_ids if self.formulation == "score_token" else self.level_token_ids

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> QScorerConfig:
        """Build from a published `config.json`; score tokens as it has them (the LoRA folder's loader adds them).

        Raises:
            ValueError: the file asks for something that the published code cannot compute either
                (grouped key/value heads, rotary scaling, attention biases, another activation).
        """
        heads = published.get("num_attention_heads", 32)
        refused = {
            "num_key_value_heads": (published.get("num_key_value_heads") or heads) == heads,
            "rope_scaling": published.get("rope_scaling") is None,
            "attention_bias": not published.get("attention_bias", False),
            "hidden_act": published.get("hidden_act", "silu") == "silu",
        }
        for name, supported in refused.items():
            if not supported:
                raise ValueError(f"config.json: {name}={published.get(name)!r} is not supported by Q-Scorer")
        visual = published.get("visual_config") or {}
        names = list(published.get("score_tokens") or [])
        ids = list(reversed(published.get("score_token_id") or []))
        if len(names) != len(ids):
            names = [f"<score{i + 1}>" for i in range(len(ids))]
        return cls(
            **{name: published[name] for name in _SAME_IN_PUBLISHED if name in published},
            rope_base=published.get("rope_theta", 10000.0),
            regressor_hidden_sizes=published.get("deepmlp_hidden_dims") or (2048, 1024),
            score_tokens=names,
            score_token_ids=ids,
            vision_config=_known_fields(QScorerVisionConfig, visual.get("visual_model")),
            abstractor_config=_known_fields(QScorerAbstractorConfig, visual.get("visual_abstractor")),
        )

    def to_published(self) -> dict[str, Any]:
        """The same facts as the published code writes them (layout 2), ready for `json.dump`.

        Raises:
            ValueError: a vision encoder that the published code does not have.
        """
        if self.vision_config.kind != "vit":
            raise ValueError(
                f"the published layouts have no vision encoder {self.vision_config.kind!r}: use layout 'qscorer'"
            )
        if self.vision_config.image_fit != "pad":
            raise ValueError("the published code pads every picture: image_fit 'mirror' needs layout 'qscorer'")
        vision = _known_fields(QScorerVisionConfig, self.vision_config.to_dict())
        vision = {name: value for name, value in vision.items() if name not in _NOT_IN_PUBLISHED}
        abstractor = _known_fields(QScorerAbstractorConfig, self.abstractor_config.to_dict())
        return {
            "architectures": ["MPLUGOwl2LlamaForCausalLM"],
            "model_type": "mplug_owl2",
            "auto_map": {
                "AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config",
                "AutoModelForCausalLM": "modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM",
            },
            **{name: getattr(self, name) for name in _SAME_IN_PUBLISHED if name != "pad_token_id"},
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "rope_theta": self.rope_base,
            "rope_scaling": None,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "image_aspect_ratio": "pad",
            "deepmlp_hidden_dims": self.regressor_hidden_sizes,
            "score_tokens": self.score_tokens,
            "score_token_id": self.score_token_ids[::-1],
            "visual_config": {
                "visual_model": {**vision, "model_type": "mplug_owl_vision_model", "hidden_act": "quick_gelu"},
                "visual_abstractor": {
                    **abstractor,
                    "model_type": "mplug_owl_visual_abstract",
                    "encoder_hidden_size": self.vision_config.hidden_size,
                },
            },
        }


def _known_fields(config_class: type[Any], fields: dict[str, Any] | None) -> dict[str, Any]:
    """The entries that our sub-configuration has; published files carry many generation settings besides."""
    return {name: value for name, value in (fields or {}).items() if name in get_annotations(config_class)}


def _sub_config(config_class: type[Any], value: Any) -> Any:
    if value is None:
        return config_class()
    return config_class(**value) if isinstance(value, dict) else value


def _check_numbers(place: str, config: PreTrainedConfig) -> None:
    """Raise `ValueError` for a size that is no positive integer, or a constant that is no positive number."""
    for names, kinds, wanted in ((_SIZES, (int,), "an integer"), (_CONSTANTS, (int, float), "a number")):
        for name in names:
            value = getattr(config, name, 1)
            if type(value) not in kinds or not 0 < value < math.inf:  # a bool is no number here
                raise ValueError(f"{place}: {name} must be {wanted} above 0, got {value!r}")


def _check_heads(place: str, config: Any) -> None:
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise ValueError(f"{place}: hidden_size must be a multiple of num_attention_heads, got {width}, {heads}")
