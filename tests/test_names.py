"""Metric names and their options."""

import inspect

import pytest

from pyiqa_qscorer import registry as names
from pyiqa_qscorer.errors import QScorerError


def test_pyiqa_config_is_what_pyiqa_reads_and_always_fresh() -> None:
    config = names.pyiqa_config("qscorer")
    published = {"checkpoint": "2kxx/Qscorer_lora_5_1", "base": "MAGAer13/mplug-owl2-llama2-7b"}
    facts = {"metric_mode": "NR", "lower_better": False, "score_range": "0, 5"}
    assert config == {"metric_opts": {"type": "QScorer", **published, "dtype": "auto"}, **facts}
    config["metric_opts"]["dtype"] = "changed"
    assert names.pyiqa_config("qscorer")["metric_opts"]["dtype"] == "auto"
    assert names.pyiqa_config("qscorer_8bit")["metric_opts"]["dtype"] == "8bit"
    assert names.pyiqa_config("qscorer_4bit")["metric_opts"]["dtype"] == "4bit"


def test_options_are_those_of_the_metric() -> None:
    from pyiqa_qscorer.metric import QScorer

    # `device` is an argument of `create_metric` and `Scorer` themselves; scores need no gradient.
    assert [*names.OPTIONS, "device", "gradient_checkpointing"] == list(inspect.signature(QScorer).parameters)
    for name, definition in names.METRICS.items():
        for special in ("swin", "face", "afine", "fid", "qalign", "compare2score"):
            assert special not in name  # pyiqa branches on them
        assert definition.options.keys() <= names.OPTIONS.keys()


def test_defaults_and_resolved_options() -> None:
    assert names.default_metric() == names.DEFAULT_METRIC == "qscorer-mini"
    for checkpoint in ("merged", names.MINI_CHECKPOINT, "owner/name"):
        assert names.METRICS[names.default_metric(checkpoint)].options["dtype"] == "auto"
    resolved = names.resolve_metric_options("qscorer_8bit", {"checkpoint": "folder", "clamp": False, "base": None})
    base = "MAGAer13/mplug-owl2-llama2-7b"
    assert resolved == {"checkpoint": "folder", "base": base, "dtype": "8bit", "clamp": False}
    assert names.METRICS["qscorer_8bit"].options["checkpoint"] == "2kxx/Qscorer_lora_5_1"


@pytest.mark.parametrize("wrong", ["qscorer-8bit", "QScorer_8bit", "qscorer8bit"])
def test_unknown_metric_names_the_nearest(wrong: str) -> None:
    with pytest.raises(KeyError) as caught:
        names.resolve_metric_options(wrong, {})
    assert isinstance(caught.value, QScorerError)
    message = str(caught.value)
    assert message.startswith(f"pyiqa-qscorer has no metric {wrong!r}; did you mean 'qscorer_8bit'")
    assert message.endswith("The names are qscorer, qscorer-mini, qscorer_8bit, qscorer_4bit")


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"has no option 'chekpoint'; did you mean 'checkpoint'"):
        names.resolve_metric_options("qscorer", {"chekpoint": "folder"})
    with pytest.raises(names.UnknownMetricError, match=r"no metric 'x'; The names are qscorer, "):
        names.pyiqa_config("x")
    with pytest.raises(names.UnknownOptionError, match="The names are checkpoint, base, revision, "):
        names.resolve_metric_options("qscorer", {"zzz": None})
