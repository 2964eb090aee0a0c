"""Measured throughput becomes the cost of the runs with that backbone."""

from dataclasses import replace

from esvit.comparison.costs import repeated_throughput, with_throughput
from tests.comparison.folders import run


def test_measurements_of_throughput_are_costs_of_the_runs_with_that_backbone():
    measured = run("cost", {"images_per_second": 500.0, "flops": 7.0}, choices__task="throughput", backbone__drop_path_rate=0.0)
    wide = run("wide", {"knn/teacher": 1.0}, backbone__dim=128)
    same = run("same", {"knn/teacher": 1.0})
    joined = with_throughput([measured, wide, same])
    assert [each.name for each in joined] == ["wide", "same"]
    assert [each.final.get("throughput/images_per_second") for each in joined] == [None, 500.0]
    assert with_throughput([measured]) == [measured]


def test_of_several_measurements_of_a_backbone_the_newest_counts_and_a_reader_is_told():
    old, new = (run("cost", {"images_per_second": speed}, choices__task="throughput") for speed in (5.0, 9.0))
    runs = [replace(new, written=2.0), replace(old, written=1.0), run("tiny", {"knn/teacher": 1.0})]
    assert with_throughput(runs)[0].final["throughput/images_per_second"] == 9.0
    assert len(repeated_throughput(runs)) == 1
    assert repeated_throughput(runs[1:]) == []
