"""Numbers stand in one column only if they were measured in one way; what is best is known from what a metric is."""

from typing import Any

import pytest

from esvit.comparison.columns import columns, lower_is_better, matches
from esvit.comparison.groups import grouped, winners
from esvit.comparison.runs import Run
from tests.comparison.folders import PROTOCOL, run


def column_of(runs: list[Run], metric: str = "knn/teacher") -> Any:
    return next(column for column in columns(runs, ["*"], best="auto") if column.metric == metric)


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
