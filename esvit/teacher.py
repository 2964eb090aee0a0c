"""The teacher: a copy of the student that follows it by an exponential moving average and never sees a gradient.

Unusual, and as in the paper's code:
* It stays in train mode for good, with drop path off, so batch norms use the statistics of its own batch.
* The average is over parameters only. Buffers are the teacher's own: batch-norm running statistics come from its own passes over
  the global crops, counters count its own passes. Averaging them would mix in statistics of local crops, which it never sees.
"""

import copy

import torch
from torch import Tensor, nn

from esvit.networks import MultiCropNetwork
from esvit.records import NetworkOutput, PrototypeWeights


class Teacher(nn.Module):
    """`network` is the EMA copy of `student`, a MultiCropNetwork not wrapped in DistributedDataParallel."""

    def __init__(self, student: MultiCropNetwork):
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.network.backbone.disable_drop_path()
        self.train()

    def train(self, mode: bool = True) -> "Teacher":
        """Always train mode, whatever is asked; an evaluation that needs eval mode sets it on its part of `network` and sets it back."""
        return super().train(True)

    @torch.no_grad()  # not inference_mode: the loss saves these tensors for the student's backward
    def forward(self, crops: list[Tensor]) -> list[NetworkOutput]:
        """One output per crop; `crops` are the global crops (B, C, H, W)."""
        return self.network(crops)

    @torch.no_grad()
    def prototypes(self) -> PrototypeWeights:
        return self.network.prototypes()

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float, finite: Tensor) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, for every parameter; no change of a bit when `finite` is False.

        student  the network, wrapped in DistributedDataParallel or not; its parameters are finite (their update was masked too)
        finite   0-d bool on the parameters' device; the host does not wait for it

        Computed as teacher + (1 - momentum) * (student - teacher): with a momentum near 1, float32 momentum and 1 - momentum do not
        add up to 1, and the plain form slowly changes even weights on which both agree.
        """
        weight = finite * (1.0 - momentum)
        for teacher_parameter, student_parameter in zip(self.network.parameters(), student.parameters(), strict=True):
            teacher_parameter.lerp_(student_parameter, weight)
