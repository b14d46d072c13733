"""Prompts, score tokens and the checks on a tokenizer, with the licensed tokenizer and with the stand-in."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_data import BLANK, table
from tiny_checkpoint import LICENSED_TOKENIZER, edit_json
from tiny_tokenizer import write_json, write_sentencepiece

from pyiqa_qscorer.checkpoints.load import load_tokenizer
from pyiqa_qscorer.errors import CheckpointError
from pyiqa_qscorer.model.qscorer import IMAGE_TOKEN_ID
from pyiqa_qscorer.prompt import PROMPTS, PromptTokens, resolve_prompt, score_tokens, tokenize_prompt

GOLDEN_TOKENIZER = table("tokenizer/tokenizer")
TRAINING_PROMPT = "v1_score1"  # template v1, the published training; its answer follows the prompt


@pytest.fixture(scope="module", params=["licensed", "stand-in", "stand-in as tokenizer.json"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "stand-in":
        return write_sentencepiece(folder)
    if request.param != "licensed":
        return write_json(folder)
    request.getfixturevalue("shared")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(LICENSED_TOKENIZER.with_name(name), folder / name)
    return folder


def loaded(folder: Path, count: int = 5) -> Any:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(score_tokens(count), special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return loaded(folder)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("stand-in"))


def joined(tokens: PromptTokens) -> list[int]:
    return [*tokens.prefix, IMAGE_TOKEN_ID, *tokens.suffix]


@pytest.mark.parametrize(("prompt", "golden"), [("score", "prompt_ids"), ("evaluation", "iqa_eval_prompt_ids")])
def test_prompts_of_the_scorer_have_the_published_ids(tokenizer: Any, prompt: str, golden: str) -> None:
    tokens = tokenize_prompt(tokenizer, prompt, published=True)
    assert joined(tokens) == GOLDEN_TOKENIZER[golden] and tokens.blank == BLANK
    assert tokenize_prompt(tokenizer, PROMPTS[prompt]) == tokens


def test_prompts_and_answers_of_the_training_have_the_published_ids(tokenizer: Any) -> None:
    sequence = GOLDEN_TOKENIZER["training"][TRAINING_PROMPT]
    answer = sequence["tokens"].index("<score1>")
    tokens = tokenize_prompt(tokenizer, "training", published=True)
    assert [*joined(tokens), tokens.blank] == sequence["input_ids"][:answer]
    assert sequence["full_text"].startswith(PROMPTS["training"])
    assert PROMPTS["score"] == GOLDEN_TOKENIZER["prompt"]
    assert PROMPTS["evaluation"] == GOLDEN_TOKENIZER["iqa_eval_prompt"]
    for level in range(1, 6):
        probe = [*GOLDEN_TOKENIZER["probe"]["The quality of the image is <score4>."]["ids"]]
        probe[probe.index(32003)] = 31999 + level
        assert tokenizer(f"The quality of the image is <score{level}>.")["input_ids"] == probe


@pytest.mark.parametrize("folder", ["licensed"], indirect=True)  # the stand-in knows the words of the prompts only
def test_probe_texts_have_the_published_ids(tokenizer: Any) -> None:
    """All but a text that starts with a blank: today's tokenizer adds none there, the published one did."""
    for text, probe in GOLDEN_TOKENIZER["probe"].items():
        if not text.startswith(" "):
            assert tokenizer(text)["input_ids"] == probe["ids"], text


@pytest.mark.parametrize("count", [1, 7])
def test_any_number_of_score_tokens(folder: Path, count: int) -> None:
    tokenizer = loaded(folder, count)
    tokens = tokenize_prompt(tokenizer, "score", published=True)
    assert joined(tokens) == GOLDEN_TOKENIZER["prompt_ids"]
    assert tokenizer.convert_tokens_to_ids(score_tokens(count)) == list(range(32000, 32000 + count))
    assert tokenizer(f"is <score{count}>")["input_ids"][-2:] == [BLANK, 31999 + count]
    assert score_tokens(5) == list(GOLDEN_TOKENIZER["score_ids"]) and score_tokens(12)[-1] == "<score12>"
    for none in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1 score token, got {none}"):
            score_tokens(none)


def test_own_text_also_without_words_before_or_after_the_image(tokenizer: Any) -> None:
    tokens = tokenize_prompt(tokenizer, "How is the quality of <|image|>\nThe quality of the image is")
    assert tokens.prefix[:5] == (1, 1128, 338, 278, 11029) and 1 not in (*tokens.prefix[1:], *tokens.suffix)
    assert tokens.suffix[:2] == (BLANK, 13) and tokens.suffix[-5:] == (11029, 310, 278, 1967, 338)
    image_first = tokenize_prompt(tokenizer, "<|image|> The quality of the image is")
    assert (image_first.prefix, image_first.suffix) == ((1,), (BLANK, 450, 11029, 310, 278, 1967, 338))
    image_last = tokenize_prompt(tokenizer, "The quality is<|image|>")
    assert (image_last.prefix, image_last.suffix) == ((1, 450, 11029, 338), ())


@pytest.mark.parametrize("prompt", ["", "scores", "Rate this.", "<|image|> and <|image|>: rate", "USER: <image>"])
def test_a_prompt_has_exactly_one_image(prompt: str) -> None:
    expected = "prompt must be one of score, evaluation, training or a text with exactly one <|image|>, got "
    with pytest.raises(ValueError, match=re.escape(expected + repr(prompt))):
        resolve_prompt(prompt)


@pytest.mark.parametrize("published", [True, False])
def test_a_dropped_bos_is_an_error(folder: Path, tmp_path: Path, published: bool) -> None:
    """transformers 5 drops BOS without a word where the configuration does not ask for it."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(copy / "tokenizer_config.json", add_bos_token=False)
    tokenizer = loaded(copy)
    if tokenizer("is")["input_ids"][0] == 1:  # tokenizer.json holds the rule itself
        tokenizer.add_bos_token = False
        tokenizer.update_post_processor()
    with pytest.raises(CheckpointError, match=r"must put its BOS token \(id 1\) once before a text.*add_bos_token"):
        tokenize_prompt(tokenizer, "score", published=published)


def test_a_tokenizer_with_other_ids_is_an_error(tmp_path: Path) -> None:
    """`▁rate` and `▁quality` exchanged: every text still tokenizes, every score would be wrong."""
    tokenizer = loaded(write_sentencepiece(tmp_path, swap=(6554, 11029)))
    with pytest.raises(CheckpointError, match=r"other ids for the 'score' prompt than the published one.*LLaMA-2"):
        tokenize_prompt(tokenizer, "score", published=True)
    assert tokenize_prompt(tokenizer, "score").prefix != ()  # a checkpoint of ours may have any tokenizer
    tokenizer = loaded(write_sentencepiece(tmp_path, swap=(29871, 31000)))
    with pytest.raises(CheckpointError, match=r"other ids for the 'score' prompt"):
        tokenize_prompt(tokenizer, "score", published=True)
    with pytest.raises(CheckpointError, match=r"puts id 31000 before a score token, the published one 29871"):
        tokenize_prompt(tokenizer, "The quality of <|image|>is", published=True)


def test_score_tokens_that_are_not_special_and_no_tokenizer_are_errors(stand_in: Path, tmp_path: Path) -> None:
    class Torn:
        """Reads `<score1>` as letters, as a tokenizer does that never heard of it."""

        def __init__(self) -> None:
            self.own = load_tokenizer(stand_in)
            self.bos_token_id, self.unk_token_id = self.own.bos_token_id, self.own.unk_token_id

        def __call__(self, text: str) -> dict[str, list[int]]:
            return self.own(text)

        def get_vocab(self) -> dict[str, int]:
            return {**self.own.get_vocab(), "<score1>": 32000}

    with pytest.raises(CheckpointError, match="were the score tokens added as special tokens"):
        tokenize_prompt(Torn(), "score", published=True)
    with pytest.raises(CheckpointError, match=r"has no tokenizer: expected tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
