"""The fused kernels: run by Triton's interpreter on the CPU against the plain formula, and compiled for GPUs that need not be there.

Whether Triton interprets is settled when it is imported, so a process of its own does. What a GPU computes is tested where there is one:
`python -m pytest tests/losses/test_fused.py -k gpu`.
"""

import multiprocessing
import os
import re
import subprocess
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.errors import OptionError
from esvit.losses import choice
from esvit.losses.chunked import ChunkedAssignments
from tests.losses.outputs import Batch
from tests.losses.test_losses import gradients, plain_region, plain_view, product_terms, view_region_loss

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
KILOBYTE = 1024


@pytest.fixture(scope="module")
def interpreting() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets kernels."""
    pytest.importorskip("triton", reason="Triton comes with torch's wheels for CUDA only")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=interpret) as process:
        if not process.submit(can_loop).result():
            pytest.skip("this version of Triton cannot interpret a loop with this version of NumPy (Triton 3.6 not with NumPy 2.4)")
        yield process


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        """The interpreter keeps bf16 as uint16, and would multiply it as such. (It also cuts off where a GPU rounds to bf16.)"""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *others: create_dot(self, widened(a), widened(b), *others)


def can_loop() -> bool:
    from esvit.losses import fused

    try:
        fused._combined(torch.zeros(2, 1), torch.zeros(2, 1, 64))
    except Exception as error:
        if "only 0-dimensional arrays can be converted" in str(error):
            return False
        raise
    return True


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ---------------------------------------------------------------------------------------------------- in the interpreter


def differences_to_the_plain_formula(dtype: torch.dtype, rows: int, prototypes: int, width: int) -> dict[str, float]:
    """Relative, of a student's softmax, of a teacher's (other prototypes, with a shift), and of the outer sum of both."""
    from esvit.losses.fused import FusedAssignments

    generator = torch.Generator().manual_seed(0)

    def unit(count: int, scale: float = 1.0) -> Tensor:
        return (F.normalize(torch.randn(count, width, generator=generator), dim=1) * scale).to(dtype)

    matrix, teacher_matrix, shift = unit(prototypes), unit(prototypes), torch.randn(1, prototypes, generator=generator)
    students, teachers = unit(rows, 10), unit(rows, 25)
    values = [1e-6 * torch.randn(rows, width, generator=generator) for _ in range(2)]
    fused = FusedAssignments(matrix)
    found, expected_sum = {}, torch.zeros(prototypes, width, dtype=torch.float64)
    for name, each, keys, offset, value in (
        ("student", students, matrix, None, values[0]),
        ("teacher", teachers, teacher_matrix, shift, values[1]),
    ):
        ((where, block),) = fused.blocks(each.float(), keys, offset)
        assert where == slice(0, rows)
        block.add_outer(value)
        logits = each.double() @ keys.double().T - (0 if offset is None else offset.double())
        found[f"{name} logsumexp"] = relative(block.logsumexp, logits.logsumexp(1))
        found[f"{name} mean"] = relative(block.mean(), logits.softmax(1) @ matrix.double())
        expected_sum += logits.softmax(1).T @ value.double()
    return found | {"outer sum": relative(fused.outer_sum(), expected_sum)}


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 5e-4)], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "rows, prototypes, width",
    [
        pytest.param(37, 200, 64, id="prototypes split over programs"),
        pytest.param(70, 90, 64, id="two blocks of rows"),
        pytest.param(1, 20, 128, id="less than a tile"),
    ],
)
def test_the_kernels_compute_the_plain_formula(interpreting, dtype, tolerance, rows, prototypes, width):
    found = interpreting.submit(differences_to_the_plain_formula, dtype, rows, prototypes, width).result()
    assert max(found["student logsumexp"], found["teacher logsumexp"]) < 1e-6, found
    assert max(found.values()) < tolerance, found


def gradient_of_rare_prototypes() -> float:
    """Relative difference, over prototypes whose probability is 4e-8; the first has nearly all."""
    from esvit.losses.fused import FusedAssignments

    rows = F.normalize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    rows[:, 0] = 17
    prototypes = 0.02 * torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    prototypes[0, 0] = 1
    rows, prototypes = rows.half(), prototypes.half()
    fused = FusedAssignments(prototypes)
    ((_, block),) = fused.blocks(rows.float(), prototypes)
    block.add_outer(rows.float() / 10000)
    softmax = (rows.double() @ prototypes.double().T).softmax(1)
    assert softmax[:, 1:].median() < 5e-8
    return relative(fused.outer_sum()[1:], (softmax.T @ rows.double() / 10000)[1:])


def test_float16_keeps_the_gradient_of_prototypes_that_are_hardly_ever_chosen(interpreting):
    assert interpreting.submit(gradient_of_rare_prototypes).result() < 1e-3


def extremes() -> dict[str, bool]:
    from esvit.losses.fused import FusedAssignments

    rows, prototypes = torch.randn(3, 64), torch.randn(40, 64).bfloat16()
    fused = FusedAssignments(prototypes)
    ((_, block),) = fused.blocks(rows, prototypes)
    block.add_outer(rows)
    before = fused.outer_sum().clone()
    block.add_outer(torch.zeros(3, 64))
    ((_, far),) = fused.blocks(1000 * rows, prototypes)
    ((_, broken),) = fused.blocks(rows.index_fill(0, torch.tensor(1), torch.nan), prototypes)
    return {
        "values of zero change nothing": torch.equal(fused.outer_sum(), before),
        "logits beyond the range of exp stay finite": bool(far.logsumexp.isfinite().all() and far.mean().isfinite().all()),
        "a row that is no number has no number for a sum": broken.logsumexp.isnan().tolist() == [False, True, False],
        "no rows make no block": not list(fused.blocks(rows[:0], prototypes)),
    }


def test_extreme_numbers(interpreting):
    found = interpreting.submit(extremes).result()
    assert all(found.values()), found


def loss_differences(dtype: torch.dtype, is_mixed: bool) -> dict[str, tuple[float, float]]:
    """Of the view-region loss and each of its gradients: (fused, chunked), both relative to the plain formula in float64."""
    batches = {name: small_batch(kind) for name, kind in (("fused", torch.float32), ("chunked", torch.float32), ("plain", torch.float64))}
    found = {}
    for name, batch in batches.items():
        mixing = batch.mixing if is_mixed else None
        if name == "plain":
            total = 0.3 * plain_view(batch, mixing) + 0.7 * plain_region(batch, mixing)
        else:
            loss = view_region_loss(batch)
            if name == "fused":
                loss.make_assignments = choice.fused_assignments
            with torch.autocast("cpu", dtype=dtype):
                total = product_terms(batch, loss, mixing).total
        found[name] = [total.detach(), *gradients(total, batch.student_tensors())]
    names = ["loss", *(f"gradient {number}" for number in range(len(found["plain"]) - 1))]
    return {
        name: (relative(ours, plain), relative(chunks, plain))
        for name, ours, chunks, plain in zip(names, found["fused"], found["chunked"], found["plain"], strict=True)
    }


def small_batch(dtype: torch.dtype) -> Batch:
    """Numbers that bf16 can hold, so that rounding begins with the products."""
    batch = Batch(([4, 4, 2], [4, 4]), images=2, embedding=64, prototypes=70, dtype=dtype)
    with torch.no_grad():
        for tensor in (*batch.student_tensors(), *batch.other_tensors()):
            tensor.copy_((tensor / 8).bfloat16())
    return batch


@pytest.mark.parametrize("is_mixed", [False, True], ids=["own images", "mixed images"])
def test_the_loss_and_all_its_gradients_are_the_same_fused_and_chunked(interpreting, is_mixed):
    found = interpreting.submit(loss_differences, torch.float16, is_mixed).result()
    assert len(found) == 1 + 2 * 3 + 2
    for name, (fused, chunks) in found.items():
        assert fused < 2e-3 and chunks < 2e-3, (name, found)


def check_with(fault: bool) -> str | None:
    """What the check of the kernels says, at a size for the interpreter; with a fault, prototypes beyond the first split are lost."""
    from esvit.losses import fused

    choice.CHECK_ROWS, choice.CHECK_PROTOTYPES = 5, 70
    choice._failure.cache_clear()
    combined = fused._combined
    if fault:
        fused._combined = lambda logsumexp, mean: (logsumexp[0], mean[0])
    try:
        return choice._failure(torch.device("cpu"), torch.bfloat16, 64)
    finally:
        fused._combined = combined


def test_the_check_before_the_first_step_finds_a_kernel_that_computes_nonsense(interpreting):
    assert interpreting.submit(check_with, False).result() is None
    assert re.fullmatch(r"its logsumexp differs by \d\.\de-\d\d", interpreting.submit(check_with, True).result())


# ---------------------------------------------------------------------------------------------------- which way is taken


def choose(kernel: str, *, precision: str = "bf16", width: int = 64) -> choice.MakeAssignments:
    return choice.choose(kernel, device=torch.device("cpu"), precision=precision, width=width)


def test_without_a_gpu_auto_is_chunked_and_fused_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto") is choose("chunked") is ChunkedAssignments
    with pytest.raises(OptionError, match="loss.kernel: 'fused' needs a CUDA GPU; use loss.kernel=auto or chunked"):
        choose("fused")


def test_kernels_that_do_not_run_are_named_in_one_line_and_replaced(monkeypatch: pytest.MonkeyPatch):
    """On a CPU they cannot."""
    pytest.importorskip("triton", reason="Triton comes with torch's wheels for CUDA only")
    monkeypatch.setattr(choice, "_obstacle", lambda *_: None)
    with pytest.warns(UserWarning) as caught:
        assert choose("auto") is ChunkedAssignments
    (warning,) = [str(each.message) for each in caught if "loss.kernel" in str(each.message)]
    assert "\n" not in warning
    assert re.fullmatch(
        r"loss\.kernel: the fused kernel failed its check on this GPU \(.+\); loss\.kernel=chunked is used instead", warning
    )
    with pytest.raises(OptionError, match="'fused' failed its check on this GPU"):
        choose("fused")


def test_what_is_computed_outside_of_autocast_stays_chunked():
    assert isinstance(choice.fused_assignments(torch.randn(5, 64), torch.float32), ChunkedAssignments)


# ---------------------------------------------------------------------------------------------------- compiled for GPUs


@pytest.mark.parametrize("capability, shared_kilobytes", [(80, 163), (90, 227)])
def test_the_kernels_compile_for_a_gpu_and_fit_into_it(tmp_path, monkeypatch, capability: int, shared_kilobytes: int):
    """Largest embeddings; registers that do not fit would show as a stack."""
    pytest.importorskip("triton", reason="Triton comes with torch's wheels for CUDA only")
    from esvit.losses import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tiles, operand = fused.LARGE, "*bf16"
    rows_and_keys = {"row_pointer": operand, "key_pointer": operand}
    counts = {"row_count": "i32", "prototype_count": "i32"}
    results = {"logsumexp_pointer": "*fp32", "mean_pointer": "*fp32"}
    attend = (
        fused._attend,
        {**rows_and_keys, "value_pointer": operand, "shift_pointer": "*fp32", **results, **counts, "split_size": "i32"},
        {"width": 256, "block_rows": tiles.owned, "block_prototypes": tiles.walked, "is_own": False, "lift": fused.LIFT},
    )
    outer = (
        fused._outer,
        {
            **rows_and_keys,
            **{"shift_pointer": "*fp32", "logsumexp_pointer": "*fp32", "value_pointer": operand, "scale_pointer": "*fp32"},
            **{"sum_pointer": "*fp32", **counts},
        },
        {"width": 256, "block_rows": tiles.walked, "block_prototypes": tiles.owned, "lift": fused.LIFT},
    )
    combine = (
        fused._combine,
        {"split_logsumexp_pointer": "*fp32", "split_mean_pointer": "*fp32", **results, "row_count": "i32", "split_count": "i32"},
        {"width": 256, "padded_splits": 256, "block_splits": 16},
    )
    for kernel, arguments, constants in (attend, combine, outer):
        shared, stack = compiled(kernel, arguments, constants, capability=capability, warps=tiles.warps, folder=tmp_path)
        assert shared <= shared_kilobytes * KILOBYTE
        assert stack <= 32


def compiled(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], *, capability: int, warps: int, folder: Path
) -> tuple[int, int]:
    """Bytes of shared memory of a block, and of a thread's stack."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from esvit.losses.fused import LAUNCH

    signature = arguments | dict.fromkeys(constants, "constexpr")
    whole_tiles = [name for name in arguments if name not in ("row_count", "split_size", "split_count")]
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in whole_tiles}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **LAUNCH})
    binary = folder / "kernel.cubin"
    binary.write_bytes(found.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return found.metadata.shared, int(stack)


# ---------------------------------------------------------------------------------------------------- on a GPU


@NEEDS_GPU
@pytest.mark.parametrize("width", choice.WIDTHS)
@pytest.mark.parametrize("precision", list(choice.PRODUCTS))
def test_on_a_gpu_fused_is_right_at_the_size_of_the_paper_and_repeats_bit_for_bit(monkeypatch, precision: str, width: int):
    device = torch.device("cuda")
    assert choice.choose("fused", device=device, precision=precision, width=width) is choice.fused_assignments
    for rows in (64, 3000):
        monkeypatch.setattr(choice, "CHECK_ROWS", rows)
        monkeypatch.setattr(choice, "CHECK_PROTOTYPES", 65536)
        found = choice.differences(device, choice.PRODUCTS[precision], width)
        assert found["logsumexp"] < choice.LOGSUMEXP_TOLERANCE, found
        assert max(found.values()) < choice.MEAN_TOLERANCE, found
        assert choice.differences(device, choice.PRODUCTS[precision], width) == found
