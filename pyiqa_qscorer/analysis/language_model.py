"""The language model inside a checkpoint: what it says next, after a text, or after a picture and a question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..checkpoints import CheckpointSource, load_checkpoint
from ..checkpoints.layouts import VLM_CONFIG, has_lora_files
from ..checkpoints.vlm_checkpoint import load_base, load_processor, saved_dtype
from ..errors import CheckpointError
from ..files import read_json
from ..images.model_images import ModelImages, WholePictures
from ..images.reading import open_image
from ..model import QScorerForScoring
from ..model.multiway import NO_VISUAL
from ..model.vlm import VlmConfig, VlmQScorer
from ..prompt import ANSWER, IMAGE_PLACEHOLDER, tokenize_prompt
from ..scorer import resolve_device

LEVEL_WORDS = ("bad", "poor", "fair", "good", "excellent")
WITH_BLANK = [f" {word}" for word in LEVEL_WORDS]
SENTENCE = "The train to the coast leaves before noon."
OURS = ("qscorer", "mplug_owl2")  # model types that are a Q-Scorer by themselves


class LanguageModel:
    """Next-token probabilities of a checkpoint that the package loads, or of a plain image-text-to-text model.

    Args:
        place: Hub id or folder of either.
        base: model under a LoRA checkpoint; None: the one that an adapter names.
        device: None: `cuda` if there is one, else `cpu`.

    Attributes:
        levels: (5,) ids of the level words, worst first, with the blank before them.
        score_ids: ids of the score tokens; empty without.

    Raises:
        CheckpointError, DownloadError: it cannot be loaded, or its tokenizer does not know ordinary text, as
            that of `qscorer-mini`, which knows the words of its prompt only, or the level words as one token each.
    """

    def __init__(
        self, place: str | Path, base: str | Path | None = None, device: str | torch.device | None = None
    ) -> None:
        self.name, self.device = str(place), resolve_device(device)
        path = CheckpointSource(place, base).fetch()[0]
        self.network: QScorerForScoring | VlmQScorer
        self.images: ModelImages
        if _is_qscorer(path):
            loaded = load_checkpoint(place, base, device=self.device)
            self.network, self.tokenizer, self.images = loaded.model, loaded.tokenizer, loaded.images
        else:
            self.network, self.images = _plain(path), WholePictures()
            self.tokenizer = self.network.encode.processor.tokenizer
        cast("nn.Module", self.network).to(self.device)
        self.levels = [self._one_token(word) for word in LEVEL_WORDS]
        config = self.network.config
        self.score_ids = list(config.quality_token_ids) if config.formulation == "score_token" else []

    @property
    def output_rows(self) -> Tensor:
        """(vocabulary, width) of the output layer, float32 on the CPU."""
        network = self.network
        table: nn.Module = network.base.get_output_embeddings() if isinstance(network, VlmQScorer) else network.lm_head
        return table.weight.detach().float().cpu()  # type: ignore[union-attr,operator]

    @torch.no_grad()
    def after_text(self, text: str) -> Tensor:
        """(T, vocabulary) log-probabilities of what follows each token of a text, float32 on the CPU."""
        ids = torch.tensor([self.ids(text)], device=self.device)
        if isinstance(self.network, VlmQScorer):
            logits = self.network.base(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        else:
            backbone = self.network.model
            logits = self.network.lm_head(backbone.decode(backbone.embed_tokens(ids), NO_VISUAL))
        return logits[0].float().log_softmax(dim=-1).cpu()

    @torch.no_grad()
    def after_picture(self, pictures: Sequence[Path], question: str, beginning: str, batch_size: int = 16) -> Tensor:
        """(N, vocabulary) log-probabilities of what follows the beginning of the answer to a question.

        Raises:
            ImageError: a picture cannot be read.
        """
        network, found = self.network, []
        text = f"USER: {IMAGE_PLACEHOLDER}\n{question} ASSISTANT: {beginning}"
        for start in range(0, len(pictures), batch_size):
            levels = [self.images.levels_from_pil(open_image(path)) for path in pictures[start : start + batch_size]]
            inputs = self.images.inputs(levels)
            if isinstance(network, VlmQScorer):
                output = network.score_prompted(inputs, network.encode.prompt(question, WITH_BLANK, beginning))
            else:
                output = network.score_prompted(inputs, tokenize_prompt(self.tokenizer, text))
            found.append(output.first_logits.float().log_softmax(dim=-1).cpu())
        return torch.cat(found)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, after the BOS token where this tokenizer has one."""
        ids, bos = list(self.tokenizer(text, add_special_tokens=False)["input_ids"]), self.tokenizer.bos_token_id
        return ids if bos is None else [bos, *ids]

    def _one_token(self, word: str) -> int:
        before, full, unknown = self.ids(ANSWER), self.ids(f"{ANSWER} {word}"), self.tokenizer.unk_token_id
        if len(full) != len(before) + 1 or (unknown is not None and unknown in [*full, *self.ids(SENTENCE)]):
            raise CheckpointError(
                f"{self.name}: its tokenizer must know ordinary text, and {word!r} as one token after {ANSWER!r}: "
                "confusion of words can be measured only on a model that knows words"
            )
        return full[-1]


def backbone_of(place: str | Path) -> str | None:
    """Hub id or folder of the model that an adapter was trained on; None: a checkpoint that does not say."""
    file = CheckpointSource(place).fetch()[0] / VLM_CONFIG
    return read_json(file).get("base") if file.exists() else None


def _is_qscorer(path: Path) -> bool:
    """Whether a folder is a checkpoint of this package or the published code, not a plain model."""
    names = [entry.name for entry in path.iterdir()]
    return VLM_CONFIG in names or has_lora_files(names) or read_json(path / "config.json").get("model_type") in OURS


def _plain(path: Path) -> VlmQScorer:
    """A model that was never tuned to score, with the level words where score tokens could be."""
    encode = load_processor(path)
    config = VlmConfig(str(path), WITH_BLANK, encode.quality_ids(WITH_BLANK), formulation="level_onehot")
    base = load_base(path, saved_dtype(path), "sdpa", torch.device("cpu"))
    return VlmQScorer(base, encode, config).eval()
