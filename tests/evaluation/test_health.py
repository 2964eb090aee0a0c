"""Signs of health against a plain computation, and alarms on planted collapses."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.evaluation.health import HealthSigns, diagnose, feature_std, health_signs, rank_me
from esvit.records import NetworkOutput, PrototypeWeights

PROTOTYPES, WIDTH, IMAGES = 50, 16, 12


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def output(view: Tensor, pooled: Tensor | None = None) -> NetworkOutput:
    return NetworkOutput(view=view, region=None, features=None, pooled=view if pooled is None else pooled)


def signs_of(
    student: list[Tensor], teacher: list[Tensor], *, prototypes: Tensor | None = None, center: Tensor | None = None, **changes
) -> HealthSigns:
    matrix = unit(PROTOTYPES, WIDTH, seed=90) if prototypes is None else prototypes
    arguments: dict[str, Any] = dict(
        student_outputs=[output(view) for view in student],
        teacher_outputs=[output(view) for view in teacher],
        student_prototypes=PrototypeWeights(view=matrix, region=None),
        teacher_prototypes=PrototypeWeights(view=matrix, region=None),
        center=torch.zeros(1, len(matrix)) if center is None else center,
        student_temperature=0.1,
        teacher_temperature=0.04,
    )
    return health_signs(**(arguments | changes))


def healthy(seed: int = 0) -> HealthSigns:
    views = unit(5, IMAGES, WIDTH, seed=seed)
    return signs_of(list(views), list(unit(2, IMAGES, WIDTH, seed=seed + 50)))


def alarms(signs: HealthSigns, *, step: int = 1000, rows: int = 2 * IMAGES) -> list[str]:
    values = {name: float(value) for name, value in signs.as_metrics().items()}
    return diagnose(values, step=step, grace_steps=300, prototypes=PROTOTYPES, rows=rows)


@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_signs_equal_a_plain_computation_with_all_logits(chunk_rows: int) -> None:
    student, teacher = unit(5, IMAGES, WIDTH, seed=1), unit(2, IMAGES, WIDTH, seed=2)
    student_matrix, teacher_matrix = unit(PROTOTYPES, WIDTH, seed=3), 1.3 * unit(PROTOTYPES, WIDTH, seed=4)
    center = 0.1 * torch.randn(1, PROTOTYPES, generator=torch.Generator().manual_seed(5))
    signs = signs_of(
        list(student),
        list(teacher),
        center=center,
        student_prototypes=PrototypeWeights(view=student_matrix, region=None),
        teacher_prototypes=PrototypeWeights(view=teacher_matrix, region=None),
        chunk_rows=chunk_rows,
    )
    p = torch.distributions.Categorical(logits=student @ student_matrix.T / 0.1)
    q = torch.distributions.Categorical(logits=(teacher @ teacher_matrix.T - center) / 0.04)
    pairs = [(i, v) for i in range(2) for v in range(5) if i != v]
    kl = [torch.sum(q.probs[i] * (q.logits[i] - p.logits[v]), dim=1).mean() for i, v in pairs]
    expected = {
        "teacher_entropy": q.entropy().mean(),
        "teacher_entropy_share": q.entropy().mean() / math.log(PROTOTYPES),
        "student_entropy": p.entropy().mean(),
        "student_entropy_share": p.entropy().mean() / math.log(PROTOTYPES),
        "kl": sum(kl, torch.zeros(())) / len(kl),
        "center_norm": center.square().sum().sqrt(),
        "prototypes_used": torch.tensor(len(q.probs.argmax(dim=-1).unique()) / (2 * IMAGES)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(signs, name), value, rtol=1e-5, atol=1e-6, msg=name)


def test_metrics_are_scalars_under_one_prefix() -> None:
    metrics = healthy().as_metrics()
    assert len(metrics) == 9
    assert all(name.startswith("health/") and value.shape == () and not value.requires_grad for name, value in metrics.items())


def test_signs_do_not_depend_on_autocast() -> None:
    plain = healthy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = healthy()
    assert plain == mixed


def test_kl_is_zero_when_all_crops_agree_with_the_teacher() -> None:
    view = unit(IMAGES, WIDTH, seed=0)
    signs = signs_of([view] * 4, [view] * 2, student_temperature=0.04)
    assert float(signs.kl) == pytest.approx(0, abs=1e-5)


def test_features_of_random_directions_are_isotropic() -> None:
    assert float(feature_std(torch.randn(4000, 20, generator=torch.Generator().manual_seed(0)))) == pytest.approx(1, abs=0.01)


def test_features_at_one_point_have_no_spread() -> None:
    scale = torch.arange(1.0, 33)[:, None]  # lengths differ, directions do not
    assert float(feature_std(scale * torch.ones(32, 20))) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_rank_me_of_equal_directions_is_their_number(rank: int) -> None:
    left, _ = torch.linalg.qr(torch.randn(64, rank, generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(24, rank, generator=torch.Generator().manual_seed(1)))
    assert float(rank_me(left @ right.T)) == pytest.approx(rank, rel=1e-3)


def test_rank_me_of_a_random_low_rank_matrix_is_about_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    assert 7 < float(rank_me(features)) <= 8.01


def test_healthy_signs_raise_no_alarm() -> None:
    assert alarms(healthy()) == []


def test_one_prototype_for_all_raises_an_alarm() -> None:
    prototypes = torch.eye(PROTOTYPES)[:, :WIDTH]
    view = torch.eye(WIDTH)[3].expand(IMAGES, WIDTH)
    student = list(unit(5, IMAGES, WIDTH, seed=7))
    signs = signs_of(student, [view, view], prototypes=prototypes, teacher_outputs=[output(view, unit(IMAGES, WIDTH, seed=8))] * 2)
    assert float(signs.prototypes_used) == pytest.approx(1 / (2 * IMAGES))
    (alarm,) = alarms(signs)
    assert "one of 50 prototypes" in alarm and "loss.center_momentum" in alarm


def test_features_at_one_point_raise_an_alarm() -> None:
    views = list(unit(5, IMAGES, WIDTH, seed=0))
    teacher = [output(view, torch.ones(IMAGES, 24)) for view in unit(2, IMAGES, WIDTH, seed=1)]
    signs = signs_of(views, [], teacher_outputs=teacher)
    assert float(signs.rank_me) == pytest.approx(1, abs=1e-3)
    (alarm,) = alarms(signs)
    assert "features collapsed to one point" in alarm and "head.batch_norm=true" in alarm


def test_uniform_outputs_raise_an_alarm() -> None:
    view = [1e-5 * each for each in unit(4, IMAGES, WIDTH, seed=0)]
    signs = signs_of(view, view[:2])
    assert float(signs.teacher_entropy_share) == pytest.approx(1, abs=1e-4)
    (alarm,) = alarms(signs)
    assert "uniform over the 50 prototypes" in alarm and "schedule.teacher_temperature_start" in alarm


def test_no_collapse_is_told_before_the_grace_steps_or_from_too_few_rows() -> None:
    view = [1e-5 * each for each in unit(4, IMAGES, WIDTH, seed=0)]
    signs = signs_of(view, view[:2])
    assert alarms(signs, step=299) == [] and alarms(signs, rows=4) == [] and len(alarms(signs, step=300)) == 1


def test_a_sign_that_is_not_finite_raises_an_alarm_at_once() -> None:
    views = list(unit(4, IMAGES, WIDTH, seed=0))
    views[1] = views[1] * float("nan")
    signs = signs_of(views, list(unit(2, IMAGES, WIDTH, seed=1)))
    (alarm,) = alarms(signs, step=1)
    assert "health/student_entropy" in alarm and "health/kl" in alarm and "health/rank_me" not in alarm
