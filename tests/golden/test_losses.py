"""The original's DINOLoss and DDINOLoss over three consecutive calls, through the product's losses.

The golden losses are given as logits: the embeddings are those logits and the prototypes the identity.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from esvit.losses.combined import ViewRegionLoss
from esvit.losses.view import ViewLoss
from esvit.records import NetworkOutput, PrototypeWeights
from tests.golden.cases import Goldens, assert_close

K = 64
IMAGES = 3
CROPS, GLOBAL_CROPS = 6, 2
EPOCHS = (0, 1, 5)
REGIONS = [49, 49, 9, 9, 9, 9]
IDENTITY = PrototypeWeights(view=torch.eye(K), region=torch.eye(K))


def teacher_temperature(epoch: int) -> float:
    """0.04 to 0.07 over 3 epochs, the final value reached at the third."""
    return float(np.linspace(0.04, 0.07, 3)[epoch]) if epoch < 3 else 0.07


def regions_of(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """Rows ordered by crop, image, position -> per crop (B, N, ...)."""
    parts = rows.split([IMAGES * count for count in counts])
    return [part.unflatten(0, (IMAGES, count)) for part, count in zip(parts, counts, strict=True)]


def outputs(views: Tensor, regions: Tensor | None = None, features: Tensor | None = None) -> list[NetworkOutput]:
    crops = views.split(IMAGES)
    if regions is None or features is None:
        return [NetworkOutput(view=view, region=None, features=None, pooled=view.detach()) for view in crops]
    counts = REGIONS[: len(crops)]
    rows = zip(crops, regions_of(regions, counts), regions_of(features, counts), strict=True)
    return [NetworkOutput(view=view, region=region, features=feature, pooled=view.detach()) for view, region, feature in rows]


def student_views(goldens: Goldens, call: int) -> Tensor:
    return goldens.input(f"loss{call}_s_cls", (CROPS * IMAGES, K), 0.3).requires_grad_()


def teacher_views(goldens: Goldens, call: int) -> Tensor:
    return goldens.input(f"loss{call}_t_cls", (GLOBAL_CROPS * IMAGES, K), 0.3)


def originals_mixup_targets(goldens: Goldens, call: int) -> Tensor:
    """(V, B, B), indexed [teacher row, student column]."""
    logits = torch.stack([goldens.input(f"loss{call}_mix{crop}", (IMAGES, IMAGES)) for crop in range(CROPS)])
    return logits.double().softmax(dim=-1).float()


@pytest.mark.parametrize("name", ["loss_view", "loss_view_mixup"])
def test_view_loss_follows_the_original_over_three_calls(goldens: Goldens, name: str):
    case = goldens.case(name)
    loss = ViewLoss(student_temperature=0.1, center_momentum=0.9, kernel="auto")
    loss.setup(prototypes=K)
    for call, epoch in enumerate(EPOCHS):
        assert epoch == case[f"call{call}_epoch"]
        assert_close(teacher_temperature(epoch), case["teacher_temp_schedule"][epoch], absolute=1e-8)
        student, teacher = student_views(goldens, call), outputs(teacher_views(goldens, call))
        # The original's targets are [teacher, student], our mixing is (student, teacher).
        mixing = originals_mixup_targets(goldens, call).mT if name == "loss_view_mixup" else None

        terms = loss(outputs(student), teacher, IDENTITY, IDENTITY, teacher_temperature(epoch), mixing)
        terms.total.backward()
        loss.update_center(teacher, IDENTITY)

        assert_close(terms.total, case[f"call{call}_loss"], relative=1e-5)
        assert_close(student.grad, case[f"call{call}_grad_s_cls"], relative_l2=1e-5)
        assert_close(loss.center, case[f"call{call}_center"], absolute=1e-6)


def test_view_region_loss_follows_the_original_over_three_calls(goldens: Goldens):
    case = goldens.case("loss_view_region")
    loss = ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.5, region_weight=0.5, kernel="auto")
    loss.setup(prototypes=K)
    student_rows, teacher_rows = IMAGES * sum(REGIONS), IMAGES * sum(REGIONS[:GLOBAL_CROPS])
    for call, epoch in enumerate(EPOCHS):
        assert epoch == case[f"call{call}_epoch"]
        assert_close(teacher_temperature(epoch), case["teacher_temp_schedule"][epoch], absolute=1e-8)
        views = student_views(goldens, call)
        regions = goldens.input(f"loss{call}_s_region", (student_rows, K), 0.3).requires_grad_()
        features = goldens.input(f"loss{call}_s_fea", (student_rows, 32)).requires_grad_()
        teacher = outputs(
            teacher_views(goldens, call),
            goldens.input(f"loss{call}_t_region", (teacher_rows, K), 0.3),
            goldens.input(f"loss{call}_t_fea", (teacher_rows, 32)),
        )

        terms = loss(outputs(views, regions, features), teacher, IDENTITY, IDENTITY, teacher_temperature(epoch))
        terms.total.backward()
        loss.update_center(teacher, IDENTITY)

        assert regions.grad is not None
        assert_close(terms.total, case[f"call{call}_loss"], relative=1e-5)
        assert_close(views.grad, case[f"call{call}_grad_s_cls"], relative_l2=1e-5)
        assert_close(regions.grad[:, :8], case[f"call{call}_grad_s_region_first8"], relative_l2=1e-5)
        assert_close(regions.grad.norm(dim=1), case[f"call{call}_grad_s_region_rownorm"], relative_l2=1e-5)
        assert (features.grad is None) == bool(case[f"call{call}_grad_s_fea_is_none"])
        assert_close(loss.center, case[f"call{call}_center"], absolute=1e-6)
        assert_close(loss.center_region, case[f"call{call}_center_grid"], absolute=1e-6)


def test_original_region_loss_ignores_mixup_targets_and_ours_does_not(goldens: Goldens):
    """`call0_loss_with_mixup_targets` is the original's loss of call 0 with targets: the same as without."""
    case = goldens.case("loss_view_region")
    assert case["call0_loss_with_mixup_targets"] == case["call0_loss"]
    loss = ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.5, region_weight=0.5, kernel="auto")
    loss.setup(prototypes=K)
    student_rows, teacher_rows = IMAGES * sum(REGIONS), IMAGES * sum(REGIONS[:GLOBAL_CROPS])
    student = outputs(
        student_views(goldens, 0),
        goldens.input("loss0_s_region", (student_rows, K), 0.3),
        goldens.input("loss0_s_fea", (student_rows, 32)),
    )
    teacher = outputs(
        teacher_views(goldens, 0),
        goldens.input("loss0_t_region", (teacher_rows, K), 0.3),
        goldens.input("loss0_t_fea", (teacher_rows, 32)),
    )
    mixing = originals_mixup_targets(goldens, 0).mT
    unmixed = loss(student, teacher, IDENTITY, IDENTITY, teacher_temperature(0))
    mixed = loss(student, teacher, IDENTITY, IDENTITY, teacher_temperature(0), mixing)
    assert mixed.view != unmixed.view
    assert mixed.region != unmixed.region
