"""Training texts: equal to the published ids and labels, for every quality token and prompt."""

from pathlib import Path

import golden_data
import pytest
import torch
from tiny_checkpoint import published_folders
from transformers import PreTrainedTokenizerBase

from pyiqa_qscorer.checkpoints.load import load_tokenizer
from pyiqa_qscorer.errors import CheckpointError
from pyiqa_qscorer.model.qscorer import IGNORED_LABEL, IMAGE_TOKEN_ID
from pyiqa_qscorer.prompt import PROMPTS, score_tokens, tokenize_prompt
from pyiqa_qscorer.training.text import pad_texts, training_text
from pyiqa_qscorer.training.tokenizer import LEVEL_WORDS, prompt_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    _, base, _ = published_folders(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(score_tokens(5), special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("level", range(5))
def test_as_published(llama: PreTrainedTokenizerBase, level: int) -> None:
    published = golden_data.table("tokenizer/tokenizer")["training"][f"v1_score{level + 1}"]
    ids, labels = training_text(llama, "training", "<score1>").with_quality(32000 + level)
    assert ids == published["input_ids"] and labels == published["labels"]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("quality", ["<score2>", *LEVEL_WORDS])
def test_small_tokenizer_reads_every_prompt(prompt: str, quality: str) -> None:
    tokenizer = prompt_tokenizer()
    tokenizer.add_tokens(score_tokens(5), special_tokens=True)
    text = training_text(tokenizer, prompt, quality)
    quality_id = tokenizer.get_vocab()[quality if quality.startswith("<") else f"▁{quality}"]
    ids, labels = text.with_quality(quality_id)
    assert ids.count(IMAGE_TOKEN_ID) == 1
    supervised = [index for index in labels if index != IGNORED_LABEL]
    words = "".join(tokenizer.convert_ids_to_tokens(supervised)).replace("▁", " ")
    assert words == f" The quality of the image is {quality}.</s>" and ids[-len(supervised) :] == supervised
    tokens = tokenize_prompt(tokenizer, prompt)
    assert ids[: len(tokens.prefix) + 1 + len(tokens.suffix)] == [*tokens.prefix, IMAGE_TOKEN_ID, *tokens.suffix]


def test_small_tokenizer_survives_saving_and_refuses_words_outside_its_vocabulary(tmp_path: Path) -> None:
    tokenizer = prompt_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for prompt in PROMPTS:
        assert tokenize_prompt(load_tokenizer(tmp_path), prompt) == tokenize_prompt(tokenizer, prompt)
    with pytest.raises(CheckpointError, match="does not know"):
        tokenize_prompt(tokenizer, "USER: Is this sharp?\n<|image|>\nASSISTANT: The quality of the image is")


def test_padding_aligns_the_image_and_quality_is_one_token(llama: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="one token"):
        training_text(prompt_tokenizer(), "training", "")
    with pytest.raises(ValueError, match="must end in"):
        training_text(llama, "USER: <|image|> ASSISTANT: It is", "<score1>")
    short = ([1, IMAGE_TOKEN_ID, 5, 6], [IGNORED_LABEL, IGNORED_LABEL, 5, 6])
    long = ([1, 2, 3, IMAGE_TOKEN_ID, 7], [IGNORED_LABEL] * 4 + [7])
    batch = pad_texts([short, long])
    assert batch["input_ids"].tolist() == [[0, 0, 1, IMAGE_TOKEN_ID, 5, 6], [1, 2, 3, IMAGE_TOKEN_ID, 7, 0]]
    assert batch["attention_mask"].int().tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    ignored = IGNORED_LABEL
    assert batch["labels"].tolist() == [[ignored] * 4 + [5, 6], [ignored] * 4 + [7, ignored]]
    assert batch["labels"].dtype == torch.long
