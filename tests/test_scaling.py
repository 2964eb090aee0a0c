"""The benchmark of growth, and what it is there to show: the loss's memory does not depend on rows x prototypes."""

import pytest
import torch

from benchmarks.scaling import cost_of, exponent, figure, measure, outgrown, parse
from esvit.losses import chunked
from esvit.tasks.throughput import LiveTensors
from tests.losses.outputs import Batch
from tests.losses.test_losses import plain_region, product_terms, view_region_loss


def loss_bytes(*, regions: int, prototypes: int, is_plain: bool) -> int:
    """Of the tensors that live at once during the region loss and its gradients, above what goes in."""
    batch = Batch(([regions, regions], [regions, regions]), prototypes=prototypes, dtype=torch.float32)
    loss = view_region_loss(batch)
    with LiveTensors([*batch.student_tensors(), *batch.other_tensors()]) as live:
        before = live.now
        if is_plain:
            plain_region(batch, None).backward()
        else:
            product_terms(batch, loss).total.backward()
    return live.peak - before


def test_the_memory_of_the_loss_does_not_depend_on_rows_times_prototypes(monkeypatch: pytest.MonkeyPatch):
    """Twice the rows, and twice the prototypes, each add something; both together add the sum of the two, and nothing for their product."""
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 4 * 400 * 8)
    rows, prototypes = 40, 400

    def by_product(*, is_plain: bool) -> int:
        sizes = {(r, k): loss_bytes(regions=r * rows, prototypes=k * prototypes, is_plain=is_plain) for r in (1, 2) for k in (1, 2)}
        return sizes[2, 2] - sizes[2, 1] - sizes[1, 2] + sizes[1, 1]

    logits = 4 * 3 * 2 * rows * prototypes  # of float32, for three images with two crops
    assert abs(by_product(is_plain=False)) < 0.02 * logits
    assert by_product(is_plain=True) > logits


def test_a_quick_run_measures_time_and_memory_of_both_steps():
    arguments = parse(["--quick", "--steps", "1", "--sizes", "global_size", "window"])
    said: list[str] = []
    report = measure(arguments, cost_of, say=said.append)
    assert report["sweeps"].keys() == {"global_size", "window"}
    for sweep in report["sweeps"].values():
        for point in sweep["points"]:
            for variant in ("product", "plain"):
                assert all(point[variant][name] > 0 for name in ("step_seconds", "step_bytes", "loss_seconds", "loss_bytes", "parameters"))
    assert [point["size"] for point in report["sweeps"]["window"]["points"]] == [7, 14]
    assert [point["size"] for point in report["sweeps"]["global_size"]["points"]] == [4, 9]
    assert "regions of a global crop  (backbone swin_micro, window 7, batch_size 1, prototypes 64, local_crops 1)" in "\n".join(said)
    assert figure(report).startswith(b"\x89PNG")


def test_the_exponent_is_the_slope_in_logarithms():
    assert exponent([(size, 5 * size**1.5) for size in (1, 2, 8)]) == pytest.approx(1.5)
    assert exponent([(2, 3.0)]) is None


def test_what_grows_faster_than_the_plain_algorithm_is_named():
    names = ("step_seconds", "step_bytes", "loss_seconds", "loss_bytes")

    def sweep(product: tuple[float, float], plain: tuple[float, float]) -> dict:
        points = [
            {variant: dict.fromkeys(names, costs[place]) for variant, costs in (("product", product), ("plain", plain))} for place in (0, 1)
        ]
        slopes = {"product": exponent([(1, product[0]), (2, product[1])]), "plain": exponent([(1, plain[0]), (2, plain[1])])}
        return {"label": "images", "points": points, "exponents": dict.fromkeys(names, slopes)}

    every = ["step (s) by images", "step (MB) by images", "loss alone (s) by images", "loss alone (MB) by images"]
    assert outgrown({"batch_size": sweep((1.0, 4.0), (1.0, 2.0))}) == every
    assert outgrown({"batch_size": sweep((1.0, 4.0), (5.0, 9.0))}) == []  # steeper because it begins with less
    assert outgrown({"batch_size": sweep((1.0, 2.0), (2.0, 2.9))}) == every
    assert outgrown({"batch_size": sweep((4.0, 5.0), (1.0, 1.9))}) == []
