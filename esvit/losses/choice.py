"""Which way the losses take through the softmax over prototypes: the option `loss.kernel`.

"chunked" works everywhere, "fused" on CUDA GPUs in bf16 or fp16. "auto" is fused where that can be, and where a small
comparison on this GPU finds it right: kernels depend on GPU, driver and Triton, and a wrong one need not stop a run. All ranks
take the same way; timing has no say, so that a resumed run takes it again.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit import distributed
from esvit.errors import OptionError
from esvit.losses.assignments import Assignments
from esvit.losses.chunked import ChunkedAssignments

OPTION = "loss.kernel"
CHUNKED, FUSED = "chunked", "fused"
LEAST_CAPABILITY = (8, 0)  # bf16 in tensor cores
WIDTHS = (64, 128, 256)  # embedding widths that the fused kernels were made for
PRODUCTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHECK_ROWS, CHECK_PROTOTYPES = 300, 5003  # several tiles of both, and ragged last ones
LOGSUMEXP_TOLERANCE = 1e-5  # relative, in L2 norm; rounding gives 1e-7
MEAN_TOLERANCE = 1e-2  # the same for means and outer sums; rounding of the softmax to bf16 gives 2e-3

# Of a matrix of the student's prototypes in the dtype of the products, and the dtype of everything else.
MakeAssignments = Callable[[Tensor, torch.dtype], Assignments]


def choose(kernel: str, *, device: torch.device, precision: str, width: int) -> MakeAssignments:
    """kernel: "auto", "chunked" or "fused"; precision as the runtime has it; width E of the embeddings. All ranks call it together.

    Raises OptionError where "fused" cannot be.
    """
    if kernel == CHUNKED:
        return ChunkedAssignments
    obstacle = _first(distributed.gather_objects(_obstacle(device, precision, width)))
    if obstacle is None:
        failure = _first(distributed.gather_objects(_failure(device, PRODUCTS[precision], width)))
        if failure is None:
            return fused_assignments
        obstacle = f"failed its check on this GPU ({failure})"
        if kernel != FUSED and distributed.rank() == 0:
            warnings.warn(f"{OPTION}: the fused kernel {obstacle}; {OPTION}=chunked is used instead", stacklevel=2)
    if kernel == FUSED:
        raise OptionError(OPTION, f"'fused' {obstacle}", f"use {OPTION}=auto or chunked")
    return ChunkedAssignments


def fused_assignments(matrix: Tensor, dtype: torch.dtype) -> Assignments:
    """Fused; for what is computed in full precision nevertheless, outside of autocast, chunked."""
    from esvit.losses.fused import FusedAssignments

    return FusedAssignments(matrix) if matrix.dtype in PRODUCTS.values() else ChunkedAssignments(matrix, dtype)


def differences(device: torch.device, dtype: torch.dtype, width: int) -> dict[str, float]:
    """Of fused and chunked results for random rows, relative in L2 norm: the largest by kind. Chunked takes the same numbers in float64."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, width, generator=generator), dim=1).to(device)

    prototypes, teacher_prototypes = unit(CHECK_PROTOTYPES).to(dtype), unit(CHECK_PROTOTYPES).to(dtype)
    students, teachers = (unit(CHECK_ROWS) / 0.1).to(dtype), (unit(CHECK_ROWS) / 0.04).to(dtype)
    shift = torch.randn(1, CHECK_PROTOTYPES, generator=generator).to(device)
    values = [1e-6 * unit(CHECK_ROWS), 1e-6 * unit(CHECK_ROWS)]  # small, as the weight of a row in a loss makes them
    found = []
    for make, exact in ((fused_assignments, torch.float32), (ChunkedAssignments, torch.float64)):
        kind = dtype if make is fused_assignments else exact
        matrix = prototypes.to(kind)
        ways = make(matrix, exact)
        parts: list[Tensor] = []
        for rows, keys, offset, each in ((students, matrix, None, values[0]), (teachers, teacher_prototypes.to(kind), shift, values[1])):
            for _, block in ways.blocks(rows.to(exact), keys, None if offset is None else offset.to(exact)):
                parts += [block.logsumexp, block.mean()]
                block.add_outer(each.to(exact))
        found.append([*parts, ways.outer_sum()])
    relative = [((ours.double() - exact).norm() / exact.norm()).item() for ours, exact in zip(*found, strict=True)]
    return {"logsumexp": max(relative[0], relative[2]), "mean": max(relative[1], relative[3]), "outer sum": relative[4]}


@functools.cache
def _failure(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """What is wrong with the fused kernels here, or None. Draws no random numbers from the run's generators."""
    try:
        found = differences(device, dtype, width)
    except Exception as error:  # whatever a compiler, a driver or a launch may raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    for what, difference in found.items():
        if not difference <= (LOGSUMEXP_TOLERANCE if what == "logsumexp" else MEAN_TOLERANCE):  # a NaN is no success
            return f"its {what} differs by {difference:.1e}"
    return None


def _obstacle(device: torch.device, precision: str, width: int) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return "needs a CUDA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"needs a GPU of compute capability 8.0 or more, this one has {capability[0]}.{capability[1]}"
    if precision not in PRODUCTS:
        return f"needs precision=bf16 or fp16, it is {precision}"
    if width not in WIDTHS:
        return f"needs head.bottleneck_dim of {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]}, it is {width}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which comes with torch's wheels for CUDA"
    return None


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)
