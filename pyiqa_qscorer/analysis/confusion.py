"""Semantic confusion: how far tuning for quality moved a model's language, and how far quality leaks into it.

The paper shows the effect by examples (its Fig. 3); its protocol was not found, so this one is ours. A tuned model is
compared with its base on texts that have nothing to do with pictures (`confusion_texts.yaml`), and asked unrelated
questions about pictures of unlike quality.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import softmax
from torch import Tensor

from ..data.labels import Floats
from ..evaluation.bootstrap import RESAMPLES, interval, resampled
from ..evaluation.correlation import srcc
from .language_model import LEVEL_WORDS, LanguageModel

NEIGHBOURS = 10
KINDS = ("neutral", "other_sense", "prompts")


@cache
def texts() -> dict[str, Any]:
    """The texts by kind, as `confusion_texts.yaml` has them."""
    content: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "confusion_texts.yaml").read_text("utf-8"))
    return content


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % percentile interval, by drawing texts or pictures with replacement."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class WordChange:
    """One level word.

    Attributes:
        where_right: change of its log-probability where a text goes on with it, in another sense.
        elsewhere: the same at all places of the neutral texts.
        base_rank, rank: median place among all tokens where a text goes on with it; 1 is the most likely.
        neighbours_kept: share of the nearest output rows (cosine) that are the same as in the base.
    """

    word: str
    where_right: Estimate
    elsewhere: Estimate
    base_rank: float
    rank: float
    neighbours_kept: float


@dataclass(frozen=True)
class Sentiment:
    """Level words as answers on 100 reviews, 20 of each level, asked in two ways.

    Attributes:
        accuracy: share of reviews whose most likely level word is the right one; chance is 0.2.
        calibrated: the same once each word's mean log-probability over all reviews is taken off, so that a model that
            merely prefers a word is not punished for it.
        order: SRCC of the expected level and the right one.
    """

    accuracy: Estimate
    calibrated: Estimate
    order: Estimate


@dataclass(frozen=True)
class Leak:
    """SRCC of the expected level in the answer to an unrelated question, and the quality of the picture beside it."""

    question: str
    base: Estimate
    tuned: Estimate


@dataclass(frozen=True)
class Confusion:
    """What tuning did to a model's language.

    Attributes:
        drift: KL(base || tuned) of next-token distributions in nats, mean over places, by kind of text. Over the
            tokens that both know, score tokens left out.
        accuracy_change, order_change: of the calibrated accuracy and of the order: tuned - base, paired by review.
        leaks: empty without pictures.
        score_token_mass: probability of all score tokens together, outside of the prompt that asks for quality: mean
            over the places of all texts; None without score tokens.
        largest_score_token_mass: at any place.
        level_word_mass, base_level_word_mass: probability of the level words together, in the neutral texts.
    """

    name: str
    drift: dict[str, Estimate]
    words: list[WordChange]
    base_sentiment: Sentiment
    sentiment: Sentiment
    accuracy_change: Estimate
    order_change: Estimate
    leaks: list[Leak]
    score_token_mass: Estimate | None
    largest_score_token_mass: float | None
    level_word_mass: Estimate
    base_level_word_mass: Estimate


@dataclass(frozen=True)
class _Answers:
    """Of one model: log-probabilities after the texts, of level words after reviews, expected levels at pictures."""

    after: dict[str, list[Tensor]]  # by kind of text, (T, vocabulary) each
    reviews: Floats  # (frames, reviews, 5)
    at_pictures: Floats  # (questions, pictures)


def compare_all(
    base: LanguageModel, tuned: Iterable[LanguageModel], pictures: Sequence[Path] = (), mos: Sequence[float] = ()
) -> list[Confusion]:
    """Measure how the language of tuned models differs from their base's.

    Args:
        tuned: of the base's tokenizer; taken one by one, so that a generator can load each when it is its turn.
        pictures, mos: of unlike quality; without, leakage is not measured.

    Raises:
        ValueError: two models read the same text as different tokens, or not as many pictures as opinions.
    """
    if len(pictures) != len(mos):
        raise ValueError(f"pictures and mos must be equally many, got {len(pictures)} and {len(mos)}")
    before, rows = _answers(base, pictures), base.output_rows
    found = []
    for model in tuned:
        for text in texts()["neutral"]:
            if model.ids(text) != base.ids(text):
                raise ValueError(f"{model.name} reads {text!r} as other tokens than {base.name}: it is not its base")
        found.append(_compared(base, model, before, _answers(model, pictures), rows, np.asarray(mos, np.float64)))
    return found


def _texts_of(kind: str) -> list[str]:
    if kind == "other_sense":
        return [text for word in LEVEL_WORDS for text in texts()[kind][word]]
    return list(texts()[kind])


def _reviews() -> tuple[list[tuple[str, str]], np.ndarray]:
    """(thing, text) of every review, and its level 0..4."""
    found = [
        (thing, text, level)
        for thing, by_word in texts()["sentiment"].items()
        for level, word in enumerate(LEVEL_WORDS)
        for text in by_word[word]
    ]
    return [(thing, text) for thing, text, _ in found], np.array([level for *_, level in found])


def _answers(model: LanguageModel, pictures: Sequence[Path]) -> _Answers:
    after = {kind: [model.after_text(text) for text in _texts_of(kind)] for kind in KINDS}
    told = [
        [
            model.after_text(frame.format(text=text, thing=thing))[-1, model.levels].numpy()
            for thing, text in _reviews()[0]
        ]
        for frame in texts()["sentiment_frames"]
    ]
    at_pictures = [
        _expected(model.after_picture(pictures, one["question"], one["answer"])[:, model.levels].numpy())
        for one in (texts()["leakage"] if pictures else [])
    ]
    return _Answers(after, np.array(told, np.float64), np.array(at_pictures, np.float64))


def _compared(
    base: LanguageModel, model: LanguageModel, before: _Answers, after: _Answers, rows: Tensor, mos: Floats
) -> Confusion:
    common = min(before.after["neutral"][0].shape[1], after.after["neutral"][0].shape[1])
    left_out = sorted({*base.score_ids, *model.score_ids})
    drift = {
        kind: _mean_of_texts(_divergence(p, q, common, left_out) for p, q in _pairs(before, after, kind))
        for kind in KINDS
    }
    labels = _reviews()[1]
    gained = _calibrated_hits(after.reviews, labels) - _calibrated_hits(before.reviews, labels)
    order = _orders(after.reviews, labels) - _orders(before.reviews, labels)
    asked = [one["question"] for one in texts()["leakage"]]
    leaks = [
        Leak(question, *(_estimate(srcc(one, mos), resampled("srcc", one, mos)) for one in levels))
        for question, *levels in zip(
            asked, before.at_pictures, after.at_pictures, strict=False
        )  # none without pictures
    ]
    every = [one for kind in KINDS for one in after.after[kind]]
    masses = [_mass(one, model.score_ids) for one in every] if model.score_ids else None
    return Confusion(
        name=model.name,
        drift=drift,
        words=_word_changes(base, model, before, after, rows),
        base_sentiment=_sentiment(labels, before.reviews),
        sentiment=_sentiment(labels, after.reviews),
        accuracy_change=_mean_of_texts(gained[:, None]),
        order_change=_estimate(order[0], order[1:]),
        leaks=leaks,
        score_token_mass=None if masses is None else _mean_of_texts(masses),
        largest_score_token_mass=None if masses is None else float(max(one.max() for one in masses)),
        level_word_mass=_mean_of_texts(_mass(one, model.levels) for one in after.after["neutral"]),
        base_level_word_mass=_mean_of_texts(_mass(one, base.levels) for one in before.after["neutral"]),
    )


def _pairs(before: _Answers, after: _Answers, kind: str) -> list[tuple[Tensor, Tensor]]:
    return list(zip(before.after[kind], after.after[kind], strict=True))


def _divergence(base: Tensor, tuned: Tensor, common: int, left_out: Sequence[int]) -> Tensor:
    """(T,) KL(base || tuned) of the first `common` tokens without `left_out`, each renormalised."""
    kept = torch.ones(common, dtype=torch.bool)
    kept[[index for index in left_out if index < common]] = False
    p, q = (one[:, :common][:, kept].double().log_softmax(dim=-1) for one in (base, tuned))
    return (p.exp() * (p - q)).sum(dim=-1)


def _mass(log_probabilities: Tensor, ids: Sequence[int]) -> Tensor:
    """(T,) probability of all `ids` together."""
    return log_probabilities[:, list(ids)].double().exp().sum(dim=-1)


def _word_changes(
    base: LanguageModel, model: LanguageModel, before: _Answers, after: _Answers, rows: Tensor
) -> list[WordChange]:
    found, per_word = [], len(_texts_of("other_sense")) // len(LEVEL_WORDS)
    tuned_rows = model.output_rows
    for index, word in enumerate(LEVEL_WORDS):
        token = base.levels[index]
        part = slice(index * per_word, (index + 1) * per_word)
        changes, ranks = [], []
        for text, (p, q) in zip(
            _texts_of("other_sense")[part], _pairs(before, after, "other_sense")[part], strict=True
        ):
            place = base.ids(text).index(token) - 1
            changes.append((q[place, token] - p[place, token]).double().reshape(1))
            ranks.append([int((one[place] > one[place, token]).sum()) + 1 for one in (p, q)])
        elsewhere = _mean_of_texts((q[:, token] - p[:, token]).double() for p, q in _pairs(before, after, "neutral"))
        base_rank, rank = np.median(np.array(ranks), axis=0)
        kept = len(_neighbours(rows, token) & _neighbours(tuned_rows, token)) / NEIGHBOURS
        found.append(WordChange(word, _mean_of_texts(changes), elsewhere, float(base_rank), float(rank), kept))
    return found


def _neighbours(rows: Tensor, token: int) -> set[int]:
    similarity = torch.nn.functional.cosine_similarity(rows, rows[token, None])
    similarity[token] = -torch.inf
    return set(similarity.topk(NEIGHBOURS).indices.tolist())


# --- statistics of reviews: `told` are log-probabilities (frames, reviews, 5), `labels` the right levels (reviews,) ---


def _expected(log_probabilities: Floats) -> Floats:
    """(..., 5) -> expected level 0..4 of the level words alone."""
    found: Floats = softmax(log_probabilities, axis=-1) @ np.arange(len(LEVEL_WORDS))
    return found


def _hits(told: Floats, labels: np.ndarray) -> Floats:
    """(reviews,) share of the frames in which the most likely word is the right one."""
    found: Floats = (told.argmax(axis=-1) == labels).mean(axis=0)
    return found


def _calibrated_hits(told: Floats, labels: np.ndarray) -> Floats:
    return _hits(told - told.mean(axis=1, keepdims=True), labels)


def _orders(told: Floats, labels: np.ndarray) -> Floats:
    """(1 + resamples,) mean SRCC over frames: of all reviews, then of each draw; the same draws for every model."""
    levels = _expected(told)
    draws = np.mean([resampled("srcc", frame, labels) for frame in levels], axis=0)
    return np.concatenate([[np.mean([srcc(frame, labels) for frame in levels])], draws])


def _sentiment(labels: np.ndarray, told: Floats) -> Sentiment:
    accuracy, calibrated = (_mean_of_texts(hits(told, labels)[:, None]) for hits in (_hits, _calibrated_hits))
    order = _orders(told, labels)
    return Sentiment(accuracy, calibrated, _estimate(order[0], order[1:]))


def _estimate(value: float, draws: Floats) -> Estimate:
    low, high = interval(draws) or (None, None)
    return Estimate(float(value), low, high)


def _mean_of_texts(values: Iterable[ArrayLike]) -> Estimate:
    """Mean over places, each text drawn as a whole."""
    texts_ = [np.asarray(one) for one in values]
    sums, counts = np.array([one.sum() for one in texts_]), np.array([len(one) for one in texts_])
    found = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(float(sums.sum() / counts.sum()), float(found.low), float(found.high))
