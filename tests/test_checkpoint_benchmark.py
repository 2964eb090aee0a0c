"""The benchmark of writing checkpoints runs, and tells of both ways."""

from benchmarks.checkpoints import lines, measure, parse


def test_training_goes_on_in_the_background_only():
    report = measure(parse(["--megabytes", "8", "--repeats", "1"]))
    assert report["now"]["steps_meanwhile"] == 0
    assert 0 < report["background"]["still"] <= report["background"]["on_disk"]
    printed = lines(report)
    assert printed[0].startswith("state of 8 MB on cpu, 1 CPU thread;") and len(printed) == 4
