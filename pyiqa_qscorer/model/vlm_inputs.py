"""Prompt and pictures as inputs of an image-text-to-text model, by its own processor and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ImageError, QScorerError
from ..images.model_images import rounded_levels
from ..images.preprocessing import straight_through
from ..prompt import ANSWER, IMAGE_PLACEHOLDER, PROMPTS, QUESTION
from .network import IGNORED_LABEL

FILLED_WITH_ONES = "attention_mask"  # of the tokens after the prompt; types of tokens (0: text) are filled with zeros
PER_TOKEN = ("input_ids", FILLED_WITH_ONES, "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class ChatPrompt:
    """A question in the chat format of a model, and the beginning of the answer, whose continuation is the quality."""

    text: str  # as the processor takes it, with the model's own placeholder of an image
    starts_text: bool  # whether the tokenizer has to put its BOS token before it
    answer_length: int  # ids at the end that belong to the answer, and are supervised in training
    ending: tuple[int, ...]  # ids after the quality token: full stop and end of text


class VlmInputs:
    """A processor, with the quality tokens in its tokenizer and the arithmetic that keeps pictures differentiable."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def prompt(self, question: str, quality_tokens: Sequence[str], beginning: str = ANSWER) -> ChatPrompt:
        """The chat text of a question.

        Args:
            question: a text with at most one `<|image|>` (the picture comes first without), or a name of
                `prompt.PROMPTS`, whose question it is in the model's own chat format.
            quality_tokens: score tokens, or level words with the blank before them.
            beginning: of the answer, which one of them continues.

        Raises:
            ValueError: more than one `<|image|>`.
            CheckpointError: no chat template, one without pictures, or a quality token that is not one token.
        """
        question = f"{IMAGE_PLACEHOLDER}{QUESTION}" if question in PROMPTS else question
        if question.count(IMAGE_PLACEHOLDER) > 1:
            raise ValueError(f"prompt must have at most one {IMAGE_PLACEHOLDER}, got {question!r}")
        before, _, after = question.rpartition(IMAGE_PLACEHOLDER)
        content = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
        content = [part for part in content if part.get("text") != ""]
        answer = [{"type": "text", "text": beginning}]
        if not getattr(self.processor, "chat_template", None):
            raise CheckpointError(
                f"{type(self.processor).__name__} has no chat template, so it is not known how a picture is asked "
                "about: take an instruction-tuned model, or put a chat_template.jinja into its folder"
            )
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
            tokenize=False,
            continue_final_message=True,
        )
        tokenizer = self.processor.tokenizer
        starts_text = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        before_quality = self._ids(beginning)
        for token in quality_tokens:
            full = self._ids(f"{beginning}{token}.")
            rest = full[len(before_quality) :]
            read = tokenizer.decode(rest[:1]).strip()
            if full[: len(before_quality)] != before_quality or len(rest) < 2 or read != token.strip():
                pieces = [tokenizer.decode([index]) for index in full]
                raise CheckpointError(
                    f"quality token {token.strip()!r} must be one token behind {beginning!r}, but the tokenizer reads "
                    f"{pieces}: " + ("it has to be added as a special token" if token[0] == "<" else "take other words")
                )
        end_of_text = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ending = (*rest[1:], *end_of_text)
        asked = self._ids(text)
        pairs = zip(reversed(asked), reversed(before_quality), strict=False)
        answer_length = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        prompt = ChatPrompt(text, starts_text, answer_length, ending)
        self._try(prompt)
        return prompt

    def quality_ids(self, quality_tokens: Sequence[str]) -> list[int]:
        """Ids of tokens that `prompt` accepts."""
        length = len(self._ids(ANSWER))
        return [self._ids(f"{ANSWER}{token}")[length] for token in quality_tokens]

    def __call__(self, pictures: Sequence[Tensor], prompts: Sequence[ChatPrompt]) -> dict[str, Tensor]:
        """Inputs of the model, padded on the left, so that every row ends where its answer goes on.

        Args:
            pictures: (3, H, W) levels: uint8, or floating point 0..255 where a gradient is wanted.
            prompts: one per picture.

        Raises:
            QScorerError: a gradient is wanted, and this processor does not let it through.
            ImageError: the processor refuses a picture, as some do with long and narrow ones.
        """
        try:
            found = self._processed([rounded_levels(picture) for picture in pictures], prompts)
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            sizes = ", ".join(f"{picture.shape[-1]}x{picture.shape[-2]}" for picture in pictures)
            raise ImageError(f"the model's image processor does not take {sizes}: {error}") from error
        if torch.is_grad_enabled() and any(picture.requires_grad for picture in pictures):
            smooth = self._processed([picture.float() for picture in pictures], prompts)
            if not smooth["pixel_values"].requires_grad:
                raise QScorerError(
                    f"{type(self.processor.image_processor).__name__} is not differentiable: it can score pictures, "
                    "but not be a loss; use a model whose image processor works on tensors throughout"
                )
            for name, value in smooth.items():
                if value.requires_grad:
                    found[name] = straight_through(found[name], value)
        return found

    def with_answer(self, inputs: dict[str, Tensor], prompts: Sequence[ChatPrompt], quality_ids: Sequence[int]) -> Any:
        """The same with the answer behind every row, and `labels` (B, T) beside them, for a teacher-forced pass."""
        rows = [[quality, *prompt.ending] for quality, prompt in zip(quality_ids, prompts, strict=True)]
        answers = torch.tensor(rows, device=inputs["input_ids"].device)
        labels = torch.full_like(inputs["input_ids"], IGNORED_LABEL)
        for row, prompt in enumerate(prompts):
            start = labels.shape[1] - prompt.answer_length
            labels[row, start:] = inputs["input_ids"][row, start:]
        longer = dict(inputs)
        for name in PER_TOKEN:
            if name in inputs:
                fill = answers if name == "input_ids" else torch.full_like(answers, name == FILLED_WITH_ONES)
                longer[name] = torch.cat([inputs[name], fill.to(inputs[name].dtype)], dim=1)
        return {**longer, "labels": torch.cat([labels, answers], dim=1)}

    def without_answer(self, batch: Mapping[str, Any], prompt: ChatPrompt) -> dict[str, Tensor]:
        """What `with_answer` was given, of a batch of one prompt: the inputs that scoring sees."""
        answer = 1 + len(prompt.ending)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return {name: value[:, :-answer] if name in PER_TOKEN else value for name, value in inputs.items()}

    def _ids(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _try(self, prompt: ChatPrompt) -> None:
        """Process a grey picture, which shows at once what the template and the processor do not agree on."""
        try:
            self._processed([torch.full((3, 64, 64), 128, dtype=torch.uint8)], [prompt])
        except Exception as error:  # of the processor, whose checks raise anything
            raise CheckpointError(
                f"{type(self.processor).__name__} cannot make inputs of {prompt.text!r} and a picture "
                f"({type(error).__name__}: {error}): does its chat template take pictures?"
            ) from error

    def _processed(self, pictures: Sequence[Tensor], prompts: Sequence[ChatPrompt]) -> dict[str, Tensor]:
        batch = self.processor(
            images=[[picture] for picture in pictures],
            text=[prompt.text for prompt in prompts],
            add_special_tokens=prompts[0].starts_text,
            padding=True,
            padding_side="left",
            input_data_format="channels_first",
            return_tensors="pt",
        )
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
