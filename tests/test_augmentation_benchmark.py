"""The benchmark of the augmentation runs on a few small files, prints its table and gives the numbers that others read."""

import pytest

from benchmarks.augmentation import lines, measure, parse


def test_the_ratio_is_that_of_the_times_and_is_printed():
    report = measure(
        parse(["--photos", "2", "--size", "60", "50", "--local-crops", "1", "--rounds", "1", "--workers", "1", "--batches", "1"])
    )
    assert report["ratio"] == pytest.approx(report["reference_cpu_ms"] / report["fast_cpu_ms"])
    assert report["device_worker_cpu_ms"] > 0
    assert report["bytes_to_device"] == 3 * (2 * 224**2 + 96**2)
    assert [(each["engine"], each["workers"]) for each in report["loader"]] == [("reference", 1), ("fast", 1), ("device", 1)]
    assert all(each["images_per_second"] > 0 and each["memory_per_worker_mb"] > 1 for each in report["loader"])
    printed = "\n".join(lines(report))
    assert f"ratio (reference / fast): {report['ratio']:.2f}" in printed
    assert "JPEG of 60 x 50 pixels" in printed
