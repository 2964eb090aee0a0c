"""The chunked cross-entropy itself, at the size of the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.losses import chunked
from esvit.losses.chunked import ChunkedAssignments
from esvit.losses.prototypes import WholeMatching, WithGradients

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


def materialised(students: Tensor, prototypes: Tensor, teachers: Tensor, teacher_prototypes: Tensor, center: Tensor, match: Tensor):
    """Sum over pairs of match[i, j] * cross-entropy, with all logits at hand; match (R, S)."""
    log_student = F.log_softmax(students @ prototypes.T / STUDENT_TEMPERATURE, dim=-1)
    targets = F.softmax((teachers @ teacher_prototypes.T - center) / TEACHER_TEMPERATURE, dim=-1)
    return -(match * (log_student @ targets.T)).sum()


def ours(students: Tensor, prototypes: Tensor, teachers: Tensor, teacher_prototypes: Tensor, center: Tensor, match: Tensor):
    matching = against(prototypes, teachers, teacher_prototypes, center)
    return total_of(matching, prototypes, [(students, match.sum(1), match.T @ students)])


def against(prototypes: Tensor, teachers: Tensor, teacher_prototypes: Tensor, center: Tensor) -> WholeMatching:
    return WholeMatching(
        prototypes=prototypes,
        teachers=teachers,
        teacher_prototypes=teacher_prototypes,
        center=center,
        student_temperature=STUDENT_TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
        make_assignments=ChunkedAssignments,
    )


def total_of(matching: WholeMatching, prototypes: Tensor, groups: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Of groups (students, mass, pulls), with gradients for all that ask for one."""
    total = torch.stack([matching(*group) for group in groups]).sum()
    gradient = matching.prototypes_gradient()
    return total if gradient is None else WithGradients.apply(total, prototypes, gradient)


def test_float32_with_65536_prototypes_agrees_with_float64_to_a_millionth(monkeypatch):
    rows, count, width = 40, 65536, 256
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 16 * count * 4)
    generator = torch.Generator().manual_seed(0)
    unit = [F.normalize(torch.randn(n, width, generator=generator), dim=-1) for n in (rows, count, rows // 2, count)]
    students, prototypes, teachers, teacher_prototypes = unit
    center = 0.05 * torch.randn(1, count, generator=generator)
    match = torch.rand(rows, rows // 2, generator=generator) / rows
    students.requires_grad_()
    prototypes.requires_grad_()

    total = ours(students, prototypes, teachers, teacher_prototypes, center, match)
    total.backward()

    exact_students, exact_prototypes = students.detach().double().requires_grad_(), prototypes.detach().double().requires_grad_()
    exact = materialised(exact_students, exact_prototypes, teachers.double(), teacher_prototypes.double(), center.double(), match.double())
    exact.backward()
    for value, reference in [(total, exact), (students.grad, exact_students.grad), (prototypes.grad, exact_prototypes.grad)]:
        assert value is not None and reference is not None
        assert ((value.double() - reference).norm() / reference.norm()).item() < 1e-6


def test_logits_far_beyond_the_range_of_exp_do_not_overflow():
    generator = torch.Generator().manual_seed(0)
    noise = [300 * torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (6, 50, 5, 50)]
    students, prototypes, teachers, teacher_prototypes = noise
    center = torch.randn(1, 50, generator=generator, dtype=torch.float64)
    match = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    students.requires_grad_()
    total = ours(students, prototypes, teachers, teacher_prototypes, center, match)
    exact = materialised(students, prototypes, teachers, teacher_prototypes, center, match)
    torch.testing.assert_close(total, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, students), torch.autograd.grad(exact, students), rtol=1e-9, atol=1e-6)


def test_gradients_pass_torchs_numerical_check(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 2 * 11 * 4)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)

    teachers, teacher_prototypes, center, mass = noise(5, 3), noise(11, 3), noise(1, 11), noise(7)

    def total(students: Tensor, pulls: Tensor, prototypes: Tensor) -> Tensor:
        return total_of(against(prototypes, teachers, teacher_prototypes, center), prototypes, [(students, mass, pulls)])

    inputs = [tensor.requires_grad_() for tensor in (noise(7, 3), noise(5, 3), noise(11, 3))]
    assert torch.autograd.gradcheck(total, inputs)


def test_float16_keeps_the_gradient_of_prototypes_that_are_hardly_ever_chosen():
    """Their probability, 4e-8 here, and the weight of a row in the total are too small for a plain float16."""
    rows, count, width = 64, 5000, 16
    generator = torch.Generator().manual_seed(0)
    students = F.normalize(torch.randn(rows, width, generator=generator), dim=-1)
    students[:, 0] = 1.7
    prototypes = 0.02 * torch.randn(count, width, generator=generator)
    prototypes[0, 0] = 1
    prototypes.requires_grad_()
    match = torch.eye(rows) / 10000
    arguments = students, prototypes, students, prototypes.detach(), torch.zeros(1, count), match

    expected = torch.autograd.grad(ours(*arguments), prototypes)[0]
    with torch.autocast("cpu", dtype=torch.float16):
        total = ours(*arguments)
    gradient = torch.autograd.grad(total, prototypes)[0]
    assert ((gradient - expected)[1:].norm() / expected[1:].norm()).item() < 0.01


def test_groups_of_rows_add_up_to_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 2 * 11 * 4)
    generator = torch.Generator().manual_seed(0)
    students, prototypes, teachers, teacher_prototypes, center = (
        0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 3), (11, 3), (5, 3), (11, 3), (1, 11))
    )
    match = torch.rand(9, 5, generator=generator, dtype=torch.float64)
    inputs = [students.requires_grad_(), prototypes.requires_grad_()]
    together = ours(students, prototypes, teachers, teacher_prototypes, center, match)
    groups = [(students[rows], match[rows].sum(1), match[rows].T @ students[rows]) for rows in (slice(0, 4), slice(4, 9))]
    apart = total_of(against(prototypes, teachers, teacher_prototypes, center), prototypes, groups)
    torch.testing.assert_close(apart, together, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(apart, inputs), torch.autograd.grad(together, inputs), rtol=1e-12, atol=1e-13)
