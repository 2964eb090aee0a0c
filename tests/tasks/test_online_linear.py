"""The classifier beside pre-training: its step, labels of several micro-batches, and options that cannot work."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from esvit.data.base import Decoder, ImageSet
from esvit.errors import OptionError
from esvit.runtime import Runtime
from esvit.tasks.distillation import StepResult
from esvit.tasks.online_linear import OnlineLinear, OnlineProbe


class Numbered(ImageSet):
    def __init__(self, labels: list[int] | None):
        self.labels = None if labels is None else np.array(labels)
        self.class_names = ["a", "b", "c"]

    def __len__(self) -> int:
        return 6

    def read(self, index: int, decode: Decoder | None = None) -> Image.Image:
        raise NotImplementedError

    def name(self, index: int) -> str:
        return str(index)


RUNTIME = Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1, stall_minutes=0)
LABELS = [0, 1, 2, 0, 1, 2]


def opened(*, labels: list[int] | None = LABELS, mixes_images: bool = False, **options: Any) -> OnlineProbe | None:
    given = OnlineLinear(**({"network": "teacher", "learning_rate": 0.5} | options))
    return given.open(Numbered(labels), dim=4, images_per_step=256, mixes_images=mixes_images, runtime=RUNTIME)


def features(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, generator=generator) for _ in range(count)]


def result_of(**pooled: list[torch.Tensor]) -> StepResult:
    """A step of which only pooled features matter here."""
    return cast(StepResult, SimpleNamespace(**pooled))


def test_a_step_is_that_of_sgd_on_both_crops_of_both_micro_batches():
    probe = opened()
    assert probe is not None
    pooled = features(4)  # crop 1 and crop 2 of the first micro-batch, then of the second
    weight = probe.linear.weight.detach().clone().requires_grad_()
    labels = torch.tensor([5, 3, 5, 3, 0, 4, 0, 4]) % 3
    loss = F.cross_entropy(torch.cat(pooled) @ weight.T, labels)
    loss.backward()
    told = probe.step(result_of(teacher_pooled=pooled), [torch.tensor([5, 3]), torch.tensor([0, 4])], step=0, total_steps=8)
    torch.testing.assert_close(told["linear/online_loss"], loss.detach())
    assert weight.grad is not None
    torch.testing.assert_close(probe.linear.weight.detach(), weight.detach() - 0.5 * weight.grad)


def test_it_learns_and_no_gradient_leaves_it():
    probe = opened(network="student")
    assert probe is not None
    pooled = [torch.eye(4)[[0, 1, 2]].requires_grad_()]
    for step in range(50):
        told = probe.step(result_of(student_pooled=pooled), [torch.tensor([0, 1, 2])], step=step, total_steps=50)
    assert told["linear/online_top1"] == 100 and pooled[0].grad is None
    assert probe.judge(torch.eye(4)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 2])) == {
        "linear/online_validation_top1": 75,
        "linear/online_validation_top5": 100,
    }


def test_none_is_off():
    assert opened(network="none", labels=None) is None


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("network", {"network": "both"}),
        ("network", {"labels": None}),
        ("network", {"network": "student", "mixes_images": True}),
        ("learning_rate", {"learning_rate": 0.0}),
    ],
)
def test_what_cannot_work_is_named(option, changes):
    with pytest.raises(OptionError, match=rf"^task\.online_linear\.{option}: "):
        opened(**changes)
