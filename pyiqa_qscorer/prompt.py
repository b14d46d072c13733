"""Prompts and score tokens: the one definition of what the decoder reads around the image.

The published repository uses three prompts (`spec` of the published code): one in its scorer, one in its evaluation
script (a blank instead of a newline before ASSISTANT), one in training (Vicuna system sentence, image first). They
give different scores; `score` is the default for the published checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .errors import CheckpointError

IMAGE_PLACEHOLDER = "<|image|>"
ANSWER = "The quality of the image is"
QUESTION = "How would you rate the quality of this image?"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROMPTS: dict[str, str] = {
    "score": f"USER: {QUESTION}\n{IMAGE_PLACEHOLDER}\nASSISTANT: {ANSWER}",
    "evaluation": f"USER: {QUESTION}\n{IMAGE_PLACEHOLDER} ASSISTANT: {ANSWER}",
    "training": f"{SYSTEM} USER: {IMAGE_PLACEHOLDER}\n{QUESTION} ASSISTANT: {ANSWER}",
}

# Ids that the LLaMA-2 tokenizer of the published checkpoints gives; a load with other ids would score silently wrong.
_QUESTION_IDS = (1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973)
_ANSWER_IDS = (450, 11029, 310, 278, 1967, 338)
_BLANK_ASSISTANT = (319, 1799, 9047, 13566, 29901)
_SYSTEM_IDS = (
    *(1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889),
    *(450, 20255, 4076, 8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889),
    *(3148, 1001, 29901, 29871),
)
_LLAMA_IDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "score": (
        (1, 3148, 1001, 29901, *_QUESTION_IDS, 13),
        (29871, 13, 22933, 9047, 13566, 29901, *_ANSWER_IDS),
    ),
    "evaluation": (
        (1, 3148, 1001, 29901, *_QUESTION_IDS, 13),
        (29871, *_BLANK_ASSISTANT, *_ANSWER_IDS),
    ),
    "training": (
        _SYSTEM_IDS,
        (29871, 13, 5328, *_QUESTION_IDS[1:], *_BLANK_ASSISTANT, *_ANSWER_IDS),
    ),
}
_LLAMA_BLANK = 29871


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every transformers tokenizer has it."""

    bos_token_id: int | None
    unk_token_id: int | None

    def __call__(self, text: str) -> dict[str, list[int]]: ...  # {"input_ids": ...}, BOS first

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as ids, before and after the image."""

    prefix: tuple[int, ...]  # BOS first
    suffix: tuple[int, ...]
    blank: int  # the token between the answer and a score token (`▁`), which a trained model chooses first


def score_tokens(count: int) -> list[str]:
    """`<score1>` .. `<scoreK>`, lowest quality first, for any K >= 1."""
    if count < 1:
        raise ValueError(f"count must be at least 1 score token, got {count}")
    return [f"<score{index + 1}>" for index in range(count)]


def resolve_prompt(prompt: str) -> str:
    """Text of a prompt given by name, or the text itself.

    Raises:
        ValueError: neither a known name nor a text with exactly one image placeholder.
    """
    text = PROMPTS.get(prompt, prompt)
    if text.count(IMAGE_PLACEHOLDER) != 1:
        raise ValueError(
            f"prompt must be one of {', '.join(PROMPTS)} or a text with exactly one {IMAGE_PLACEHOLDER}, got {prompt!r}"
        )
    return text


def tokenize_prompt(tokenizer: Tokenizer, prompt: str, *, published: bool = False) -> PromptTokens:
    """Ids of a prompt as the published code makes them, checked.

    Each side of the image is tokenized alone and the second BOS dropped. The tokenizer puts a blank before the second
    side, because it starts a text; the published models were trained with it.

    Args:
        published: the checkpoint is a published one, so the ids must be the pinned ones. A tokenizer with LLaMA's
            vocabulary is held to them anyway.

    Raises:
        ValueError: see `resolve_prompt`.
        CheckpointError: the tokenizer adds no BOS, or is not the one that the checkpoint was trained with.
    """
    text = resolve_prompt(prompt)
    before, after = text.split(IMAGE_PLACEHOLDER)
    bos = tokenizer.bos_token_id
    blank = _blank(tokenizer)
    sides = []
    for side in (before, after):
        ids = list(tokenizer(side)["input_ids"])
        if ids[:1] != [bos] or bos in ids[1:]:
            raise CheckpointError(
                f"tokenizer must put its BOS token (id {bos}) once before a text, got ids {ids[:4]} for {side[:20]!r}; "
                "set add_bos_token to true in tokenizer_config.json"
            )
        if tokenizer.unk_token_id in ids:
            raise CheckpointError(f"prompt has words that this checkpoint's tokenizer does not know: {side!r}")
        # The published tokenizer puts a blank before any text, today's spares a text that has one already.
        sides.append((blank, *ids[1:]) if side.startswith(" ") else tuple(ids[1:]))
    prefix, suffix = (*ids[:1], *sides[0]), sides[1]
    if published or tokenizer.get_vocab().get("▁quality") == _QUESTION_IDS[5]:
        _check_pinned_ids(text, prefix, suffix, blank)
    return PromptTokens(prefix, suffix, blank)


def _blank(tokenizer: Tokenizer) -> int:
    """Id of the lone blank; where there are score tokens, checked to stand between the answer and a score token."""
    vocabulary = tokenizer.get_vocab()
    blank, score_id = vocabulary.get("▁"), vocabulary.get(score_tokens(1)[0])
    if blank is None:
        raise CheckpointError("tokenizer must have the piece '▁', a lone blank, as SentencePiece ones do")
    answer = list(tokenizer(ANSWER)["input_ids"])
    with_score = list(tokenizer(f"{ANSWER} {score_tokens(1)[0]}")["input_ids"])
    if score_id is not None and with_score != [*answer, blank, score_id]:
        raise CheckpointError(
            f"tokenizer must read '{ANSWER} <score1>' as the answer, one blank ({blank}) and the score token "
            f"({score_id}), got ids {with_score} against {answer}; were the score tokens added as special tokens?"
        )
    return blank


def _check_pinned_ids(text: str, prefix: tuple[int, ...], suffix: tuple[int, ...], blank: int) -> None:
    for name, (expected_prefix, expected_suffix) in _LLAMA_IDS.items():
        if text == PROMPTS[name] and (prefix, suffix) != (expected_prefix, expected_suffix):
            raise CheckpointError(
                f"tokenizer gives other ids for the {name!r} prompt than the published one: {prefix} + {suffix} "
                f"instead of {expected_prefix} + {expected_suffix}; it must be the LLaMA-2 one with legacy=False"
            )
    if blank != _LLAMA_BLANK:
        raise CheckpointError(f"tokenizer puts id {blank} before a score token, the published one {_LLAMA_BLANK}")
