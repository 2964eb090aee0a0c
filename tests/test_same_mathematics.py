"""The comparison of option combinations with the plain step runs, passes, and notices what is not the same."""

import dataclasses

import pytest
import torch

from benchmarks.same_mathematics import TOLERANCES, Course, compare, distance, parse

SMALL = "--steps 2 --graphs off --parts 2 --precision fp32 --prototypes 64 --local-crops 1 --batch-size 1 --threads 1 --device cpu"


def test_combinations_take_the_plain_steps(capsys: pytest.CaptureFixture[str]):
    threads = torch.get_num_threads()
    try:
        report = compare(parse(SMALL.split()))
    finally:
        torch.set_num_threads(threads)
    assert report["same"] and len(report["ways"]) == 4
    assert {way["recompute"] for way in report["ways"]} == {"none", "mlp", "attention", "blocks"}
    assert report["plain_losses"][0] != report["plain_losses"][1]
    assert "TOO FAR" not in capsys.readouterr().out


def test_another_loss_or_gradient_is_noticed():
    plain = Course([6.0, 5.0], {"large": torch.ones(100), "small": torch.full((4,), 1e-3), "zero": torch.full((4,), 1e-9)})
    tolerance = TOLERANCES["fp32"]
    unused = dataclasses.replace(plain, gradients=plain.gradients | {"unused": torch.zeros(4)})
    assert distance(unused, unused, tolerance).gradient_share == 0
    rounding = dataclasses.replace(plain, gradients=plain.gradients | {"zero": -plain.gradients["zero"]})
    assert distance(rounding, plain, tolerance).gradient_share < 1
    other = distance(dataclasses.replace(plain, gradients=plain.gradients | {"small": 1.01 * plain.gradients["small"]}), plain, tolerance)
    assert other.parameter == "small" and other.gradient == pytest.approx(0.01, rel=1e-3) and other.gradient_share > 1
    assert distance(dataclasses.replace(plain, losses=[6.0, 5.01]), plain, tolerance).loss == pytest.approx(0.002)
