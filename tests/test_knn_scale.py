"""The benchmark of k-NN at ImageNet's size: it measures a part, and says what the whole would take."""

import pytest

from benchmarks.knn_scale import lines, measure, parse


def test_the_whole_is_extrapolated_from_the_part_by_the_number_of_pairs():
    options = ["--train", "300", "--test", "50", "--width", "8", "--classes", "7", "--neighbours", "1", "20"]
    report = measure(parse([*options, "--whole-train", "3000", "--whole-test", "500"]))
    assert report["whole_seconds"] == pytest.approx(100 * report["seconds"])
    assert report["seconds"] > 0
    printed = "\n".join(lines(report))
    assert "50 test images against 300 x 8 training features, on cpu, 1 CPU thread" in printed
    assert "500 against 3000: x 100.0" in printed
