"""Training texts: prompt, answer and labels as ids, aligned so that the image stands in one column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..model.qscorer import IGNORED_LABEL, IMAGE_TOKEN_ID
from ..prompt import ANSWER, PromptTokens, tokenize_prompt


@dataclass(frozen=True)
class TrainingText:
    """Ids of one question with its answer up to the token that tells the quality.

    Attributes:
        prompt: ids around the image; its end is the beginning of the answer.
        answer_length: how many ids at the end of the prompt belong to the answer, and are supervised.
        before_quality: ids between the answer and the quality token: the blank for a score token, nothing for a word.
        ending: ids after the quality token: full stop and end of text.
    """

    prompt: PromptTokens
    answer_length: int
    before_quality: tuple[int, ...]
    ending: tuple[int, ...]

    def with_quality(self, quality_id: int) -> tuple[list[int], list[int]]:
        """(ids, labels) of the whole text, one image placeholder included."""
        answer = [*self.before_quality, quality_id, *self.ending]
        ids = [*self.prompt.prefix, IMAGE_TOKEN_ID, *self.prompt.suffix, *answer]
        supervised = self.answer_length + len(answer)
        return ids, [IGNORED_LABEL] * (len(ids) - supervised) + ids[-supervised:]


def training_text(tokenizer: PreTrainedTokenizerBase, prompt: str, quality_token: str) -> TrainingText:
    """Text of `prompt` answered by "The quality of the image is QUALITY.", as the published data set builds it.

    Args:
        prompt: name or text, ending in the beginning of the answer.
        quality_token: any token that can stand as QUALITY: a score token, or a level word.

    Raises:
        ValueError: another ending of the prompt, or no such token.
        CheckpointError: see `tokenize_prompt`.
    """
    tokens = tokenize_prompt(tokenizer, prompt)
    answer = list(tokenizer(ANSWER)["input_ids"])[1:]
    if list(tokens.suffix[-len(answer) :]) != answer:
        raise ValueError(f"prompt must end in {ANSWER!r}, whose continuation is trained, got {prompt!r}")
    full = list(tokenizer(f"{ANSWER} {quality_token}.")["input_ids"])[1:]
    rest = full[len(answer) :]
    before = (tokens.blank,) if rest[0] == tokens.blank else ()
    if full[: len(answer)] != answer or len(rest) <= len(before) + 1:
        raise ValueError(f"quality token {quality_token!r} must be one token of the tokenizer, got ids {rest}")
    ending = (*rest[len(before) + 1 :], tokenizer.eos_token_id)
    return TrainingText(tokens, len(answer), before, ending)


def pad_texts(texts: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Batch of (ids, labels), padded left and right so that the image placeholder stands in one column.

    Returns:
        `input_ids`, `labels` (B, T) int64 and `attention_mask` (B, T) bool. The padding id is 0; it is masked.
    """
    columns = [ids.index(IMAGE_TOKEN_ID) for ids, _ in texts]
    left = [max(columns) - column for column in columns]
    length = max(pad + len(ids) for pad, (ids, _) in zip(left, texts, strict=True))
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    labels = torch.full((len(texts), length), IGNORED_LABEL, dtype=torch.long)
    attention_mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, (pad, (ids, supervised)) in enumerate(zip(left, texts, strict=True)):
        columns_of_text = slice(pad, pad + len(ids))
        input_ids[row, columns_of_text] = torch.tensor(ids)
        labels[row, columns_of_text] = torch.tensor(supervised)
        attention_mask[row, columns_of_text] = True
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
