"""Only options that differ and can matter are told, each by a name that is long enough."""

from esvit.comparison.differences import differing_options, short_names
from tests.comparison.folders import run


def test_only_options_that_differ_and_matter_are_told():
    one = run("a", {}, optimizer__learning_rate=0.1, output_dir="x", tracking__uri="u", seed=0, data__workers=1)
    other = run("b", {}, optimizer__learning_rate=0.2, output_dir="y", tracking__uri="v", seed=1, data__workers=2, head__layers=3)
    assert differing_options([one, other]) == ["optimizer.learning_rate", "head.layers"]


def test_options_that_follow_from_a_differing_choice_are_not_repeated():
    view = run("a", {}, choices__loss="view")
    region = [run(f"b{weight}", {}, choices__loss="view_region", loss__region_weight=weight) for weight in (0.5, 0.5)]
    assert differing_options([view, *region]) == ["choices.loss"]
    region.append(run("c", {}, choices__loss="view_region", loss__region_weight=0.9))
    assert differing_options([view, *region]) == ["choices.loss", "loss.region_weight"]


def test_short_names_are_as_long_as_they_must_be():
    names = ["optimizer.learning_rate", "schedule.warmup.learning_rate", "choices.loss", "seed"]
    assert list(short_names(names).values()) == ["optimizer.learning_rate", "warmup.learning_rate", "loss", "seed"]
