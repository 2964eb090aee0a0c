"""What belongs together, means and deviations, ranks, and the Pareto front: all answers computed by hand."""

import math
from typing import Any

import pytest

from esvit.comparison.columns import columns
from esvit.comparison.groups import grouped, pareto_front, ranked, telling_options, winners
from esvit.comparison.runs import Run
from tests.comparison.folders import run


def three_seeds(values: list[float], **changes: Any) -> list[Run]:
    return [run(f"r{seed}", {"knn/teacher": value}, seed=seed, **changes) for seed, value in enumerate(values)]


def column_of(runs: list[Run], metric: str = "knn/teacher") -> Any:
    return next(column for column in columns(runs, ["*"], best="auto") if column.metric == metric)


def test_runs_that_differ_in_their_seed_only_are_one_group_with_mean_and_deviation():
    runs = three_seeds([70.0, 72.0, 74.0])
    (group,) = grouped(runs)
    summary = group.summary(column_of(runs))
    assert summary is not None
    assert (summary.mean, summary.deviation, summary.count, summary.provisional) == (72.0, 2.0, 3, False)


def test_one_run_has_no_deviation():
    runs = three_seeds([70.0])
    summary = grouped(runs)[0].summary(column_of(runs))
    assert summary is not None and summary.deviation is None


def test_the_best_value_on_the_way_is_taken_run_by_run():
    runs = [run("r0", {"knn/teacher": [80.0, 70.0]}, seed=0), run("r1", {"knn/teacher": [60.0, 74.0]}, seed=1)]
    (group,) = grouped(runs)
    final, best = group.summary(column_of(runs)), group.summary(column_of(runs), best=True)
    assert final is not None and best is not None
    assert (final.mean, best.mean) == (72.0, 77.0)


def test_unfinished_runs_stay_out_of_a_mean_unless_there_are_no_others():
    done = [*three_seeds([70.0, 74.0]), run("r2", {"knn/teacher": 10.0}, seed=2, status="failed")]
    summary = grouped(done)[0].summary(column_of(done))
    assert summary is not None and (summary.mean, summary.count, summary.provisional) == (72.0, 2, False)
    open_ones = [run("r0", {"knn/teacher": 10.0}, status="running")]
    summary = grouped(open_ones)[0].summary(column_of(open_ones))
    assert summary is not None and (summary.mean, summary.provisional) == (10.0, True)


def test_a_value_that_is_not_finite_shows_in_the_mean():
    runs = three_seeds([70.0, math.nan])
    summary = grouped(runs)[0].summary(column_of(runs))
    assert summary is not None and math.isnan(summary.mean)


def test_long_labels_are_cut_and_stay_different():
    paths = [f"/a/very/long/path/to/images/of/many/kinds/{name}" for name in ("one", "two")]
    runs = [run("r", {}, data__root=path, optimizer__learning_rate=rate) for path in paths for rate in (0.1, 0.2)]
    labels = [group.label for group in grouped(runs)]
    assert len(set(labels)) == 4
    assert max(map(len, labels)) < 70


def test_options_that_tell_the_same_groups_apart_are_told_once():
    choices = [("leaves", 5, 0.1), ("leaves", 5, 0.2), ("stones", 3, 0.1)]
    runs = [run("r", {}, data__root=root, epochs=epochs, optimizer__learning_rate=rate) for root, epochs, rate in choices]
    assert set(grouped(runs)[0].options) == {"data.root", "epochs", "optimizer.learning_rate"}
    assert telling_options(grouped(runs)) == ["optimizer.learning_rate", "data.root"]


def test_groups_are_ranked_with_unfinished_ones_and_those_without_a_value_last():
    runs = [
        run("low", {"knn/teacher": 50.0}, epochs=1),
        run("open", {"knn/teacher": 99.0}, epochs=2, status="running"),
        run("none", {}, epochs=3),
        run("high", {"knn/teacher": 70.0}, epochs=4),
    ]
    column = column_of(runs)
    order = ranked(grouped(runs), column)
    assert [group.label for group in order] == ["high", "low", "open", "none"]
    assert winners(order, column) == {0}


def test_labels_are_the_runs_names_where_these_tell_the_groups_apart():
    named = [run(f"{loss}_seed{seed}", {}, choices__loss=loss, seed=seed) for loss in ("view", "both") for seed in (0, 1)]
    assert [group.label for group in grouped(named)] == ["view", "both"]
    alike = [run("swin", {}, optimizer__learning_rate=rate) for rate in (0.1, 0.2)]
    assert [group.label for group in grouped(alike)] == ["learning_rate=0.1", "learning_rate=0.2"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lr_0.1_seed3", "lr_0.1"),
        ("view seed 0", "view"),
        ("view-s1", "view"),
        ("materials1", "materials1"),
        ("loss=view,seed=2", "loss=view"),
    ],
)
def test_a_seed_at_the_end_of_a_name_does_not_count(name, told):
    runs = [run(name, {}), run("other", {}, epochs=9)]
    assert grouped(runs)[0].label == told


def test_the_pareto_front_is_of_those_that_no_other_beats_in_both():
    """Cheap and bad, dear and good, one in the middle; a fourth is dearer and worse than the middle one, a fifth equals it."""
    points = {0: (1.0, 50.0), 1: (10.0, 80.0), 2: (5.0, 70.0), 3: (6.0, 60.0), 4: (5.0, 70.0)}
    assert pareto_front(points, lower_cost=True, lower_value=False) == [0, 2, 4, 1]
    assert pareto_front(points, lower_cost=False, lower_value=False) == [1]
    assert pareto_front(points, lower_cost=True, lower_value=True) == [0]
