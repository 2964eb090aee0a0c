"""What one step of pre-training takes on a GPU, in memory and arithmetic, counted without a GPU and without computing a number.

Teacher, student and loss run once on torch's fake tensors: they have shape, type and device, and no memory, so that a batch of any size
costs the same second or two. The bytes of all tensors alive at once are added up as they come and go, as the allocator of a GPU would
see them. The count ends where the backward pass begins, because most is alive there: from then on activations go as gradients come.

Not counted: what CUDA, cuBLAS and NCCL keep for themselves, fragmentation, and the work space inside of one operation.

Letters: B images of one micro-batch.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from esvit.records import NetworkOutput
from esvit.tasks.plan_ranks import HeadRows
from esvit.tasks.pretrain import Pretrain
from esvit.tasks.throughput import LiveTensors
from esvit.teacher import Teacher

_DEVICE = torch.device("cuda", 0)
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Bytes of one process, and operations of one micro-batch of B images.

    parameters   of student or teacher, with heads; of these `backbone` in the backbone, `trained` not frozen (numbers, not bytes)
    weights      student and teacher, their buffers and the centres
    gradients    of everything trained; `early_gradients` without the prototypes', which come at the end
    moments      the optimizer's state
    passes       everything else that is alive when it is most, in each pass of the student: the batch and the loss's chunks too
    flops        multiply-adds of teacher, student (three times its forward pass) and loss
    last_flops   of these, the last pass of backward
    rows         embeddings of each head
    """

    parameters: int
    backbone: int
    trained: int
    weights: int
    gradients: int
    early_gradients: int
    moments: int
    passes: tuple[int, ...]
    flops: int
    last_flops: int
    rows: tuple[HeadRows, ...]

    @property
    def activations(self) -> int:
        return max(self.passes)

    def gradients_beside(self, *, keeps_gradients: bool) -> int:
        """Bytes of gradients next to activations. `keeps_gradients`: they outlive a micro-batch, in DDP's buckets or by accumulation."""
        return self.gradients if keeps_gradients else self.early_gradients if len(self.passes) > 1 else 0

    def peak(self, *, keeps_gradients: bool) -> int:
        """Largest number of bytes at once."""
        first, *later = self.passes
        beside = self.gradients_beside(keeps_gradients=keeps_gradients)
        forward = max([first + (beside if keeps_gradients else 0), *(each + beside for each in later)])
        return self.weights + self.moments + max(forward, self.gradients)

    def in_shares(self, ways: int) -> "StepCost":
        """Of a process that has but one of so many shares of student, teacher and moments; whole are prototypes, centres and gradients.

        Backbone and heads are trained as a whole here, so that their gradients are as large as they are.
        """
        spared = 2 * self.early_gradients * (ways - 1) // ways
        return replace(self, weights=self.weights - spared, moments=self.moments - spared)

    def with_prototypes_in_shares(self, share: "StepCost", ways: int, *, width: int) -> "StepCost":
        """Of a process that has one of so many shares of the prototypes, and gets the rows of all the others. width: of an embedding.

        share  the cost if these prototypes were all

        Rows are in memory as embeddings, the student's with their gradients; the student's of one pass at a time.
        """
        numbers = sum(rows.teachers + 2 * math.ceil(rows.students / len(self.passes)) for rows in self.rows)
        everyones = 4 * width * (ways - 1) * numbers
        return replace(
            self,
            weights=share.weights,
            gradients=share.gradients,
            moments=share.moments,
            passes=tuple(each + everyones for each in share.passes),
        )

    def checkpoint(self) -> int:
        """Of one file."""
        return self.weights + self.moments


def count_step(task: Pretrain, *, batch_size: int, precision: str, device: torch.device = _DEVICE) -> StepCost:
    """The cost of `task`, whose parts were made on torch's meta device.

    device  whose kernels and automatic types are meant; only kernels of CUDA keep no attention weights
    """
    network = task.head.attach(task.backbone, regions=task.loss.needs_regions)
    task.loss.setup(prototypes=task.head.prototypes)
    teacher = Teacher(network)
    network.backbone.recompute(task.recompute)
    sizes = task.augmentation.crop_sizes
    with _fake(), torch.device(device):
        for module in (network, teacher, task.loss):
            _made_fake(module)
        optimizer = task.optimizer.build(network, precision="fp32", device=device)
        moments = [value for state in optimizer.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        kept = [each for module in (network, teacher, task.loss) for each in (*module.parameters(), *module.buffers())]
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        prototypes = {
            id(each) for part in (network.view_prototypes, network.region_prototypes) if part is not None for each in part.parameters()
        }
        crops = [torch.empty(batch_size, task.data.channels, size, size) for size in sizes]
        with LiveTensors([*kept, *moments]) as live, _Flops() as flops, _AsOnDevice(device), _autocast(device, precision):
            weights_and_moments = live.now
            for crop in crops:
                live.count(crop)
            targets = teacher(crops[: task.augmentation.global_count])
            teacher_prototypes = teacher.prototypes()
            teacher_flops = flops.total
            loss = task.loss.against(targets, network.prototypes(), teacher_prototypes, 0.04, crops=len(crops))
            mixed, mixing = task.mixing(crops, np.random.default_rng(0)) if task.mixing.is_on else (crops, None)
            student_flops, last_flops, peaks = 0, 0, []
            rows = _rows(targets)
            student_rows = [0] * len(rows)
            for group in network.passes(mixed, parts=task.parts):
                before = flops.total
                outputs = network(mixed[group])
                last_flops = flops.total - before
                student_flops += last_flops
                terms = loss.terms(outputs, group, mixing)
                student_rows = [before + more for before, more in zip(student_rows, _rows(outputs), strict=True)]
                del outputs, terms
                peaks.append(live.peak - weights_and_moments)
                live.peak = live.now
            loss.prototype_gradients()
            loss_flops = flops.total - teacher_flops - student_flops
    return StepCost(
        parameters=sum(each.numel() for each in network.parameters()),
        backbone=sum(each.numel() for each in network.backbone.parameters()),
        trained=sum(each.numel() for each in trained),
        weights=weights_and_moments - _bytes(moments),
        gradients=_bytes(trained),
        moments=_bytes(moments),
        early_gradients=_bytes([each for each in trained if id(each) not in prototypes]),
        passes=tuple(peaks),
        flops=(teacher_flops + 3 * student_flops + loss_flops) // 2,
        rows=tuple(HeadRows(students=ours, teachers=theirs) for ours, theirs in zip(student_rows, rows, strict=True)),
        last_flops=last_flops,  # twice a forward pass, of two operations for a multiply-add
    )


def _rows(outputs: list[NetworkOutput]) -> list[int]:
    """Embeddings of each head."""
    views = sum(len(output.view) for output in outputs)
    regions = sum(output.region.shape[0] * output.region.shape[1] for output in outputs if output.region is not None)
    return [views, regions] if regions else [views]


def _bytes(tensors: list[Any]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


@cache
def _fake() -> FakeTensorMode:
    """One for the whole process: tensors of two modes do not mix, and backbones keep masks that they have made."""
    return FakeTensorMode()


def _made_fake(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Flops(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products, convolutions and attention, two for a multiply-add."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        count = flop_registry.get(torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet)  # torch's table lacks those in place
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


class _AsOnDevice(TorchFunctionMode):
    """Answers for a device that is not here.

    On CUDA attention takes a kernel that keeps no attention weights; without a GPU torch would choose another. A number that the host
    draws, for example which neighbours a window looks at, is 0: any will do.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self._device.type == "cuda":
            return _efficient_attention(*args, **(kwargs or {}))
        if func in (Tensor.item, Tensor.__int__):
            return 0
        return func(*args, **(kwargs or {}))


def _efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """(B, heads, T, d) each, mask broadcast over (B, heads, T, T) -> (B, heads, T, d)."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True, scale=scale)[0]


@contextlib.contextmanager
def _autocast(device: torch.device, precision: str) -> Iterator[None]:
    """`torch.autocast`, which on a machine without a GPU would turn itself off for CUDA."""
    if precision == "fp32":
        yield
        return
    torch.set_autocast_enabled(device.type, True)
    torch.set_autocast_dtype(device.type, _TYPES[precision])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device.type, False)
