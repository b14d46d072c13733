"""The small tokenizer of new networks: it knows the words of the three prompts, the levels and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ..prompt import IMAGE_PLACEHOLDER, PROMPTS

SPECIAL = ("<unk>", "<s>", "</s>")
BLANK = "▁"
LEVEL_WORDS = ("bad", "poor", "fair", "good", "excellent")
MARKS = r"[\n.,:?'_]"


def prompt_tokenizer(words: Iterable[str] = LEVEL_WORDS) -> PreTrainedTokenizerFast:
    """Word tokenizer with BOS, for prompts without words outside `PROMPTS` and `words`.

    It reads a text as LLaMA's does where it matters: the first word gets a blank, a blank before a special token is a
    token of its own, marks and line ends are tokens.
    """
    texts = [text.replace(IMAGE_PLACEHOLDER, " ") for text in PROMPTS.values()]
    known = {word for text in [*texts, *words] for word in re.sub(MARKS, " ", text).split()}
    marks = {mark for text in texts for mark in re.findall(MARKS, text)}
    pieces = [*SPECIAL, BLANK, *sorted(marks), *(piece for word in sorted(known) for piece in (BLANK + word, word))]
    backend = Tokenizer(WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=SPECIAL[0]))
    backend.pre_tokenizer = Sequence(
        [Metaspace(replacement=BLANK, prepend_scheme="first"), Split(Regex(MARKS), behavior="isolated")]
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
