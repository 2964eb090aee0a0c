"""What differs, what belongs together, means and deviations, columns, and the Pareto front: all answers computed by hand."""

import math
from typing import Any

import pytest

from esvit.comparison.groups import (
    columns,
    differing_options,
    grouped,
    lower_is_better,
    matches,
    pareto_front,
    ranked,
    repeated_throughput,
    short_names,
    winners,
    with_throughput,
)
from esvit.comparison.runs import Run
from tests.comparison.folders import PROTOCOL, run


def three_seeds(values: list[float], **changes: Any) -> list[Run]:
    return [run(f"r{seed}", {"knn/teacher": value}, seed=seed, **changes) for seed, value in enumerate(values)]


def column_of(runs: list[Run], metric: str = "knn/teacher") -> Any:
    return next(column for column in columns(runs, ["*"], best="auto") if column.metric == metric)


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


def test_short_names_are_as_long_as_they_must_be():
    names = ["optimizer.learning_rate", "schedule.warmup.learning_rate", "choices.loss", "seed"]
    assert list(short_names(names).values()) == ["optimizer.learning_rate", "warmup.learning_rate", "loss", "seed"]


def test_a_metric_measured_by_two_protocols_has_two_columns_that_say_what_differs():
    other = {**PROTOCOL, "frozen": {"crop": 128, "weights": "b", "step": 99}}
    runs = [run("a", {"knn/top1": 50.0}, protocol=PROTOCOL), run("b", {"knn/top1": 60.0}, protocol=other, epochs=2)]
    first, second = columns(runs, ["*"], best="auto")
    assert (first.variant, second.variant) == ("frozen.crop=96", "frozen.crop=128")
    assert first.of(runs[0]) is not None and first.of(runs[1]) is None
    assert winners(grouped(runs), first) == set()


def test_weights_and_step_keep_nothing_apart():
    other = {**PROTOCOL, "frozen": {"crop": 96, "weights": "b", "step": 99}}
    runs = [run("a", {"knn/top1": 50.0}, protocol=PROTOCOL), run("b", {"knn/top1": 60.0}, protocol=other, epochs=2)]
    (column,) = columns(runs, ["*"], best="auto")
    assert column.variant == ""
    assert winners(grouped(runs), column) == {1}


def test_protocols_of_different_images_go_by_the_names_of_their_folders():
    other = {**PROTOCOL, "data": {"train": "2e" * 16}}
    runs = [
        run("a", {"knn/top1": 50.0}, protocol=PROTOCOL),
        run("b", {"knn/top1": 60.0}, protocol=other, data__val_root="/data/stones/val", data__root="/data/stones/train"),
    ]
    assert [column.variant for column in columns(runs, ["*"], best="auto")] == ["leaves", "stones"]


def test_of_different_images_with_one_name_the_hashes_are_told():
    other = {**PROTOCOL, "data": {"train": "2e" * 16}}
    runs = [run("a", {"knn/top1": 50.0}, protocol=PROTOCOL), run("b", {"knn/top1": 60.0}, protocol=other)]
    assert [column.variant for column in columns(runs, ["*"], best="auto")] == ["data.train=1f1f1f1f", "data.train=2e2e2e2e"]


def test_losses_of_different_numbers_of_prototypes_have_no_best():
    runs = [run(f"k{count}", {"loss/total": 5.0 + count, "knn/teacher": 50.0 + count}, head__prototypes=count) for count in (1, 2)]
    loss, knn = column_of(runs, "loss/total"), column_of(runs)
    assert (loss.apart, knn.apart) == (("head.prototypes",), ())
    assert (winners(grouped(runs), loss), winners(grouped(runs), knn)) == (set(), {1})


def test_the_smallest_loss_and_the_highest_accuracy_are_best():
    runs = [run("a", {"loss/total": 1.0, "knn/teacher": 50.0}), run("b", {"loss/total": 2.0, "knn/teacher": 60.0}, epochs=2)]
    assert winners(grouped(runs), column_of(runs, "loss/total")) == {0}
    assert winners(grouped(runs), column_of(runs)) == {1}


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("loss/total", True),
        ("correspondence/error_pixels", True),
        ("peak_memory_gb", True),
        ("knn/top1_k20", False),
        ("images_per_second", False),
    ],
)
def test_what_is_good_is_known_from_a_metrics_name(metric, lower):
    assert lower_is_better(metric, "auto") is lower
    assert lower_is_better(metric, "min") and not lower_is_better(metric, "max")


def test_patterns_choose_and_take_out():
    assert matches("knn/top1_k20", ["knn/*"])
    assert not matches("knn/raw_pixels", ["knn/*", "!knn/raw_pixels"])


def test_the_pareto_front_is_of_those_that_no_other_beats_in_both():
    """Cheap and bad, dear and good, one in the middle; a fourth is dearer and worse than the middle one, a fifth equals it."""
    points = {0: (1.0, 50.0), 1: (10.0, 80.0), 2: (5.0, 70.0), 3: (6.0, 60.0), 4: (5.0, 70.0)}
    assert pareto_front(points, lower_cost=True, lower_value=False) == [0, 2, 4, 1]
    assert pareto_front(points, lower_cost=False, lower_value=False) == [1]
    assert pareto_front(points, lower_cost=True, lower_value=True) == [0]


def test_measurements_of_throughput_are_costs_of_the_runs_with_that_backbone():
    measured = run("cost", {"images_per_second": 500.0, "flops": 7.0}, choices__task="throughput", backbone__drop_path_rate=0.0)
    wide = run("wide", {"knn/teacher": 1.0}, backbone__dim=128)
    same = run("same", {"knn/teacher": 1.0})
    joined = with_throughput([measured, wide, same])
    assert [each.name for each in joined] == ["wide", "same"]
    assert [each.final.get("throughput/images_per_second") for each in joined] == [None, 500.0]
    assert with_throughput([measured]) == [measured]


def test_of_several_measurements_of_a_backbone_the_newest_counts_and_a_reader_is_told():
    from dataclasses import replace

    old, new = (run("cost", {"images_per_second": speed}, choices__task="throughput") for speed in (5.0, 9.0))
    runs = [replace(new, written=2.0), replace(old, written=1.0), run("tiny", {"knn/teacher": 1.0})]
    assert with_throughput(runs)[0].final["throughput/images_per_second"] == 9.0
    assert len(repeated_throughput(runs)) == 1
    assert repeated_throughput(runs[1:]) == []
