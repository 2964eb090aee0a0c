"""View and view-region loss against the plain, materialised formula, and what they promise beyond numbers."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plain import losses as plain
from esvit.losses import chunked
from esvit.losses.combined import ViewRegionLoss
from esvit.losses.view import ViewLoss
from esvit.records import LossTerms, NetworkOutput
from tests.losses.outputs import Batch

LAYOUTS = {
    "two globals and two local sizes": ([12, 12, 6, 6, 2], [12, 12]),
    "no local crops": ([6, 6], [6, 6]),
    "three globals": ([6, 6, 6, 4], [6, 6, 6]),
    "globals of two sizes": ([6, 12, 4], [6, 12]),
}


@pytest.fixture(params=list(LAYOUTS.values()), ids=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> tuple[list[int], list[int]]:
    return request.param


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Chunks of a few rows, so that small tests run through many and through a ragged last one."""
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 4 * 37 * 4)


def view_loss(batch: Batch) -> ViewLoss:
    loss = ViewLoss(student_temperature=0.1, center_momentum=0.9, kernel="auto")
    loss.setup(prototypes=batch.center.shape[1])
    loss.center = batch.center.clone()
    return loss


def view_region_loss(batch: Batch) -> ViewRegionLoss:
    loss = ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.3, region_weight=0.7, kernel="auto")
    loss.setup(prototypes=batch.center.shape[1])
    loss.center, loss.center_region = batch.center.clone(), batch.center_region.clone()
    return loss


def product_terms(batch: Batch, loss: ViewLoss | ViewRegionLoss, mixing: Tensor | None = None) -> LossTerms:
    return loss(batch.student, batch.teacher, batch.student_prototypes, batch.teacher_prototypes, 0.05, mixing)


def plain_view(batch: Batch, mixing: Tensor | None) -> Tensor:
    matrices = batch.student_prototypes.view, batch.teacher_prototypes.view
    return plain.view_loss(
        batch.student, batch.teacher, *matrices, batch.center, student_temperature=0.1, teacher_temperature=0.05, mixing=mixing
    )


def plain_region(batch: Batch, mixing: Tensor | None) -> Tensor:
    student, teacher = batch.student_prototypes.region, batch.teacher_prototypes.region
    assert student is not None and teacher is not None
    return plain.region_loss(
        batch.student,
        batch.teacher,
        student,
        teacher,
        batch.center_region,
        student_temperature=0.1,
        teacher_temperature=0.05,
        mixing=mixing,
    )


def gradients(total: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("mixed", [False, True])
def test_view_loss_and_gradients_equal_the_plain_formula(layout, mixed, tiny_chunks):
    batch = Batch(layout)
    mixing = batch.mixing if mixed else None
    terms = product_terms(batch, view_loss(batch), mixing)
    expected = plain_view(batch, mixing)
    torch.testing.assert_close(terms.total, expected, rtol=1e-12, atol=1e-12)
    tensors = batch.student_tensors()
    torch.testing.assert_close(gradients(terms.total, tensors), gradients(expected, tensors), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_view_region_loss_and_gradients_equal_the_plain_formula(layout, mixed, tiny_chunks):
    batch = Batch(layout)
    mixing = batch.mixing if mixed else None
    terms = product_terms(batch, view_region_loss(batch), mixing)
    view, region = plain_view(batch, mixing), plain_region(batch, mixing)
    expected = 0.3 * view + 0.7 * region
    assert terms.region is not None
    torch.testing.assert_close(terms.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.view, view.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.region, region.detach(), rtol=1e-12, atol=1e-12)
    tensors = batch.student_tensors()
    torch.testing.assert_close(gradients(terms.total, tensors), gradients(expected, tensors), rtol=1e-11, atol=1e-12)


def test_identity_mixing_changes_nothing(layout):
    batch = Batch(layout)
    identity = torch.eye(3, dtype=torch.float64).expand(len(batch.student), 3, 3)
    loss = view_region_loss(batch)
    mixed, unmixed = product_terms(batch, loss, identity), product_terms(batch, loss)
    torch.testing.assert_close((mixed.view, mixed.region), (unmixed.view, unmixed.region), rtol=1e-13, atol=1e-13)


def test_float32_equals_the_plain_formula_in_float64_over_several_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 50 * 3000 * 4)
    regions = [12, 12, 6], [12, 12]
    batch = Batch(regions, embedding=32, prototypes=3000, dtype=torch.float32)
    exact = Batch(regions, embedding=32, prototypes=3000)
    for output in (*batch.student, *exact.student):  # logits of the size of a trained network's
        for tensor in (output.view, output.region):
            assert tensor is not None
            tensor.data /= 6
    terms = product_terms(batch, view_region_loss(batch), batch.mixing)
    expected = 0.3 * plain_view(exact, exact.mixing) + 0.7 * plain_region(exact, exact.mixing)
    assert terms.total.dtype == torch.float32
    assert relative(terms.total, expected) < 1e-6
    tensors, exact_tensors = batch.student_tensors(), exact.student_tensors()
    for ours, theirs in zip(gradients(terms.total, tensors), gradients(expected, exact_tensors), strict=True):
        assert relative(ours, theirs) < 2e-6


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def test_teacher_and_matched_features_receive_no_gradient():
    batch = Batch(LAYOUTS["two globals and two local sizes"])
    product_terms(batch, view_region_loss(batch), batch.mixing).total.backward()
    assert all(tensor.grad is None for tensor in batch.other_tensors())
    assert all(tensor.grad is not None for tensor in batch.student_tensors())


def test_only_what_asks_for_a_gradient_gets_one():
    batch = Batch(LAYOUTS["no local crops"])
    frozen = batch.student_prototypes
    expected = gradients(product_terms(batch, view_loss(batch)).total, [batch.student[0].view])
    frozen.view.requires_grad_(False)
    total = product_terms(batch, view_loss(batch)).total
    torch.testing.assert_close(gradients(total, [batch.student[0].view]), expected, rtol=0, atol=0)
    with torch.no_grad():
        evaluated = product_terms(batch, view_loss(batch)).total
    assert not evaluated.requires_grad
    assert evaluated == total


def test_terms_are_detached_and_total_is_not():
    batch = Batch(LAYOUTS["no local crops"])
    terms = product_terms(batch, view_region_loss(batch))
    assert terms.region is not None
    assert terms.total.requires_grad and not terms.view.requires_grad and not terms.region.requires_grad


def test_a_network_without_a_region_head_is_refused():
    batch = Batch(LAYOUTS["no local crops"])
    batch.student = [NetworkOutput(view=output.view, region=None, features=None, pooled=output.pooled) for output in batch.student]
    with pytest.raises(ValueError, match="built without a region head"):
        product_terms(batch, view_region_loss(batch))


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_of_rows_by_prototypes_is_ever_made(autocast, monkeypatch):
    prototypes, chunk_rows = 500, 16
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 4 * prototypes * chunk_rows)
    batch = Batch(([20, 20, 8, 8], [20, 20]), prototypes=prototypes, dtype=torch.float32)
    loss = view_region_loss(batch)
    with LargestTensor() as largest, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        product_terms(batch, loss, batch.mixing).total.backward()
        loss.update_center(batch.teacher, batch.teacher_prototypes)
    student_rows, teacher_rows = 3 * 56, 3 * 40
    assert largest.elements == chunk_rows * prototypes
    assert chunk_rows < teacher_rows < student_rows


def test_autograd_saves_nothing_of_rows_by_prototypes():
    batch = Batch(([20, 20, 8, 8], [20, 20]), prototypes=900, dtype=torch.float32)
    saved: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        product_terms(batch, view_region_loss(batch)).total.backward()
    assert max(saved) == batch.student_prototypes.view.numel()  # the gradient of the prototypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_half_precision_and_sums_in_float32(dtype):
    """Only the matrix products lose digits, though a probability of this softmax is among float16's smallest numbers."""
    batch = Batch(([12, 12, 6], [12, 12]), embedding=32, prototypes=20000, dtype=torch.float32)
    for weights in (batch.student_prototypes, batch.teacher_prototypes):
        for matrix in (weights.view, weights.region):
            assert matrix is not None
            matrix.data /= 60  # flat distributions, as at the start of training
    loss = view_region_loss(batch)
    loss.center.zero_()
    loss.center_region.zero_()
    tensors = batch.student_tensors()
    expected = product_terms(batch, loss)
    with torch.autocast("cpu", dtype=dtype):
        terms = product_terms(batch, loss)
    precision = torch.finfo(dtype).eps
    assert terms.total.dtype == torch.float32
    assert relative(terms.total, expected.total) < precision
    for ours, exact in zip(gradients(terms.total, tensors), gradients(expected.total, tensors), strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, exact) < 4 * precision


def test_everything_runs_and_repeats_bit_by_bit_with_deterministic_algorithms():
    batch = Batch(LAYOUTS["two globals and two local sizes"], dtype=torch.float32)
    tensors = batch.student_tensors()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(product_terms(batch, view_region_loss(batch), batch.mixing).total, tensors) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_gradient_can_be_scaled_and_asked_for_twice():
    batch = Batch(LAYOUTS["no local crops"])
    total = product_terms(batch, view_region_loss(batch)).total
    tensors = batch.student_tensors()
    once = torch.autograd.grad(total, tensors, retain_graph=True)
    scaled = torch.autograd.grad(total * 8, tensors)
    torch.testing.assert_close(scaled, tuple(gradient * 8 for gradient in once), rtol=0, atol=0)


def test_centres_follow_the_plain_formula_over_views_regions_and_micro_batches(layout):
    batch, second = Batch(layout), Batch(layout, seed=1)
    loss = view_region_loss(batch)
    outputs = [*batch.teacher, *second.teacher]
    loss.update_center(outputs, batch.teacher_prototypes)
    views = [output.view for output in outputs]
    regions = [output.region for output in outputs if output.region is not None]
    matrices = batch.teacher_prototypes
    assert matrices.region is not None
    center = plain.center_after(batch.center, views, matrices.view, momentum=0.9)
    center_region = plain.center_after(batch.center_region, regions, matrices.region, momentum=0.9)
    torch.testing.assert_close(loss.center, center.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.center_region, center_region.detach(), rtol=1e-12, atol=1e-12)
    assert not loss.center.requires_grad

    views_only = view_loss(batch)
    views_only.update_center(outputs, batch.teacher_prototypes)
    torch.testing.assert_close(views_only.center, loss.center, rtol=0, atol=0)


@pytest.mark.parametrize("flag", [torch.tensor(False), torch.tensor(0.0)])
def test_a_step_that_is_not_finite_leaves_the_centres_unchanged(flag):
    batch = Batch(LAYOUTS["no local crops"])
    batch.teacher[0].view.data[0, 0] = torch.nan
    assert batch.teacher[0].region is not None
    batch.teacher[0].region.data[0, 0, 0] = torch.inf
    loss = view_region_loss(batch)
    loss.update_center(batch.teacher, batch.teacher_prototypes, flag)
    assert torch.equal(loss.center, batch.center)
    assert torch.equal(loss.center_region, batch.center_region)


@pytest.mark.parametrize("flag", [torch.tensor(True), torch.tensor(1.0)])
def test_a_finite_step_moves_the_centres(flag):
    batch = Batch(LAYOUTS["no local crops"])
    loss, unflagged = view_region_loss(batch), view_region_loss(batch)
    loss.update_center(batch.teacher, batch.teacher_prototypes, flag)
    unflagged.update_center(batch.teacher, batch.teacher_prototypes)
    assert torch.equal(loss.center, unflagged.center)
    assert not torch.equal(loss.center, batch.center)


def test_centres_are_part_of_the_state():
    loss = ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.5, region_weight=0.5, kernel="auto")
    loss.setup(prototypes=7)
    assert {name: value.shape for name, value in loss.state_dict().items()} == {"center": (1, 7), "center_region": (1, 7)}
    assert all(value.dtype == torch.float32 and not value.any() for value in loss.state_dict().values())
    restored = copy.deepcopy(loss)
    loss.center += 1
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(restored.center, loss.center)
