"""Cross-entropy between prototype assignments of teacher and student, and their centre, without ever keeping K-wide logits.

With student embeddings h_i, matched teacher rows j of weight A_ij, prototypes W (student) and W' (teacher), centre c,
temperatures s (student) and t (teacher):

    q_j   = softmax((W' h'_j - c) / t)                              the target, no gradient
    total = sum_ij A_ij * cross_entropy(q_j, softmax(W h_i / s))
          = sum_i mass_i * logsumexp(W h_i / s)  -  1/s * sum_j pull_j . (q_j W)
    mass_i = sum_j A_ij        pull_j = sum_i A_ij h_i

so the pairs (i, j) meet in E dimensions (`pull`, built by the caller) and each row meets the K prototypes once. Rows are taken
in chunks; because the weight of each row in the total is known beforehand, the chunk that has the softmax at hand also
writes the gradients, all of them (rows, E) or (K, E), and `backward` only scales them.

The total is a sum over student rows, so these may come in groups, each of which can pass its backward before the next one is
made: only one group's activations live at a time. The prototypes' gradient is added up beside autograd. Its teacher part needs
the pulls of all groups and comes last, which makes the targets a second time: the one thing that is computed twice.

Letters: R student rows of a group, S teacher rows, E embedding width, K prototypes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esvit import distributed

# Size of one chunk of float32 logits. CPU: 256 rows of 65,536 prototypes, from where the matrix
# products, each of which reads all prototypes once per chunk, gain no more by more rows. Elsewhere: 1,024 rows, to fill the device.
CPU_CHUNK_BYTES = 64 * 2**20
DEVICE_CHUNK_BYTES = 256 * 2**20
FEW = 1 / 4  # of a chunk's rows: a product of fewer takes as long as reading and writing the prototypes' gradient


class Matching:
    """The `total` of the module's formula, for the teacher rows of one micro-batch and group after group of student rows.

    prototypes (K, E), teachers (S, E), teacher_prototypes (K, E), center (1, K); nothing of the teacher's gets a gradient.
    Embeddings need not be unit vectors. Under autocast the matrix products run in its dtype, everything else in float32 (or float64).
    """

    def __init__(
        self,
        *,
        prototypes: Tensor,
        teachers: Tensor,
        teacher_prototypes: Tensor,
        center: Tensor,
        student_temperature: float,
        teacher_temperature: float,
    ):
        device = prototypes.device.type
        dtype = torch.promote_types(torch.promote_types(prototypes.dtype, teachers.dtype), torch.float32)
        product_dtype = dtype
        if torch.is_autocast_enabled(device) and dtype == torch.float32:
            product_dtype = torch.get_autocast_dtype(device)
        self.dtype = dtype
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        with torch.no_grad(), torch.autocast(device, enabled=False):
            self.matrix = prototypes.detach().to(product_dtype)
            self._teachers = teachers.detach().to(dtype)
            self._teacher_matrix = teacher_prototypes.detach().to(product_dtype)
            self._shift = center.to(dtype) / teacher_temperature
            self._pulls = torch.zeros_like(self._teachers)
            self._expected = torch.empty_like(self._teachers)  # q_j W / -s: a pull's gradient
            self._few_targets: Tensor | None = None
            self.products = _Products(len(prototypes), dtype, product_dtype, prototypes.device)
            for rows, targets in self._targets():
                self._expected[rows] = self.products.mix(targets, self.matrix) / -student_temperature
                if len(teachers) <= self.products.few:
                    self._few_targets = targets
        is_trained = prototypes.requires_grad and torch.is_grad_enabled()
        self.outer_sum = _OuterSum(self.products, width=prototypes.shape[1]) if is_trained else None

    def __call__(self, students: Tensor, mass: Tensor, pulls: Tensor) -> Tensor:
        """The part of the total of a group: students (R, E), mass (R,), pulls (S, E). A scalar with gradients for students and pulls."""
        with torch.autocast(students.device.type, enabled=False):
            pulls = pulls.to(self.dtype)
            self._pulls += pulls.detach()
            rows = _StudentRows.apply(students.to(self.dtype), mass.detach().to(self.dtype), self, torch.is_grad_enabled())
            return rows + (pulls * self._expected).sum()

    @torch.no_grad()
    def prototypes_gradient(self) -> Tensor | None:
        """(K, E): the total's gradient for the prototypes, once all groups have been called; None where they are frozen."""
        if self.outer_sum is None:
            return None
        with torch.autocast(self.matrix.device.type, enabled=False):
            everything = slice(0, len(self._teachers))
            for rows, targets in self._targets() if self._few_targets is None else [(everything, self._few_targets)]:
                self.outer_sum.add(targets, self._pulls[rows] / -self.student_temperature)
            return self.outer_sum.total()

    def _targets(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunk by chunk: rows, and their targets (rows, K), which hold until the next chunk."""
        for rows, logits in self.products.chunks(len(self._teachers)):
            targets, _ = self.products.softmax(logits, self._teachers[rows] / self.teacher_temperature, self._teacher_matrix, self._shift)
            yield rows, targets


class _StudentRows(torch.autograd.Function):
    """sum_i mass_i * logsumexp(W h_i / s); the prototypes' gradient goes into `matching`, for a total of weight one."""

    @staticmethod
    def forward(ctx, students: Tensor, mass: Tensor, matching: Matching, grad_enabled: bool) -> Tensor:
        gradient = torch.empty_like(students) if grad_enabled and ctx.needs_input_grad[0] else None
        products, temperature = matching.products, matching.student_temperature
        total = students.new_zeros(())
        for rows, logits in products.chunks(len(students)):
            softmax, logsumexp = products.softmax(logits, students[rows] / temperature, matching.matrix)
            total += mass[rows].dot(logsumexp)
            weight = mass[rows, None] / temperature
            if gradient is not None:
                gradient[rows] = products.mix(softmax, matching.matrix) * weight
            if grad_enabled and matching.outer_sum is not None:
                matching.outer_sum.add(softmax, students[rows] * weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * scale, None, None, None


class WithGradients(torch.autograd.Function):
    """A scalar whose gradients for some tensors are known already: `apply(total, tensors and their gradients, in turn)`."""

    @staticmethod
    def forward(ctx, total: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[1::2])
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        gradients: list[Tensor | None] = [scale]
        for gradient in ctx.saved_tensors:
            gradients += [gradient * scale, None]
        return tuple(gradients)


class _Products:
    """The operations of rows with K prototypes, chunk by chunk in one buffer of float32.

    Float16 alone needs care: its normal numbers end at 6e-5 and 65,504, and a probability of a 65,536-way softmax as well as
    the weight of one row in the total are below. Both are scaled up, so far that their product, summed over a chunk, still fits.
    """

    def __init__(self, count: int, dtype: torch.dtype, product_dtype: torch.dtype, device: torch.device):
        budget = CPU_CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
        self.rows = max(1, budget // (4 * count))
        self.few = int(self.rows * FEW)
        self._is_exact = product_dtype == dtype
        self._lift = 2.0**15 / self.rows if product_dtype == torch.float16 else 1.0
        self._count, self._dtype, self._product_dtype, self._device = count, dtype, product_dtype, device

    def chunks(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Of so many rows: which ones, and room (rows, K) for their logits, the same for all chunks."""
        buffer = torch.empty(min(rows, self.rows), self._count, dtype=self._dtype, device=self._device)
        for start in range(0, rows, self.rows):
            stop = min(start + self.rows, rows)
            yield slice(start, stop), buffer[: stop - start]

    def zeros(self, width: int) -> Tensor:
        """(K, width)."""
        return torch.zeros(self._count, width, dtype=self._dtype, device=self._device)

    def softmax(self, logits: Tensor, embeddings: Tensor, matrix: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Softmax (rows, K) over the logits `embeddings @ matrix.T - shift`, and their logsumexp (rows,).

        The softmax takes the place of `logits`; it comes in the dtype of the products and times `lift`, ready for them.
        """
        if self._is_exact:
            torch.mm(embeddings, matrix.T, out=logits)
        else:
            logits.copy_(embeddings.to(self._product_dtype) @ matrix.T)
        if shift is not None:
            logits.sub_(shift)
        largest = logits.amax(dim=1)
        probabilities = torch.softmax(logits, dim=1, out=logits)
        # The largest logit is also its own probability's logarithm plus the logsumexp: cheaper than a second sum of exponentials.
        logsumexp = largest - probabilities.amax(dim=1).log()
        if self._lift != 1:
            probabilities.mul_(self._lift)
        return probabilities.to(self._product_dtype), logsumexp

    def mix(self, softmax: Tensor, matrix: Tensor) -> Tensor:
        """(rows, E): the mean prototype under each row's softmax."""
        return (softmax @ matrix).to(self._dtype) / self._lift

    def add_outer(self, total: Tensor, softmax: Tensor, values: Tensor) -> None:
        """total (K, E) += softmax.T @ values (rows, E), accumulated in float32; at most a chunk of rows."""
        if self._is_exact:
            total.addmm_(softmax.T, values)
        elif self._product_dtype == torch.float16:
            peak = values.abs().amax().clamp_min(torch.finfo(values.dtype).tiny)
            total += (softmax.T @ (values / peak).half()).float() * (peak / self._lift)
        else:
            total += softmax.T @ values.to(self._product_dtype)


class _OuterSum:
    """The sum of softmax.T @ values over all chunks, (K, E). Few rows wait until there are more of them, see FEW."""

    def __init__(self, products: _Products, *, width: int):
        self._products = products
        self._sum = products.zeros(width)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, softmax: Tensor, values: Tensor) -> None:
        """softmax (rows, K), which may be overwritten afterwards; values (rows, E)."""
        few = self._products.few
        if len(values) > few:
            self._products.add_outer(self._sum, softmax, values)
            return
        if sum(len(waiting) for _, waiting in self._waiting) + len(values) > few:
            self._add_waiting()
        self._waiting.append((softmax.clone(), values))

    def total(self) -> Tensor:
        self._add_waiting()
        return self._sum

    def _add_waiting(self) -> None:
        if self._waiting:
            softmax, values = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._products.add_outer(self._sum, softmax, values)
            self._waiting.clear()


@torch.no_grad()
def updated_center(
    center: Tensor, embeddings: list[Tensor], prototypes: Tensor, *, momentum: float, finite: Tensor | None = None
) -> Tensor:
    """The centre's moving average over the teacher's logits of one step and of all ranks: W' applied to the mean embedding.

    center (1, K); embeddings: tensors (..., E), whose rows count alike; prototypes (K, E), the teacher's. Where the 0-d
    tensor `finite` is 0 the centre stays as it is, whatever the embeddings hold; the decision stays on the device.
    """
    with torch.autocast(center.device.type, enabled=False):
        rows = torch.cat([embedding.flatten(0, -2).to(prototypes.dtype) for embedding in embeddings])
        batch_center = distributed.mean(rows.mean(dim=0)) @ prototypes.T
        center_now = center * momentum + batch_center.to(center.dtype) * (1 - momentum)
        return center_now if finite is None else torch.where(finite.bool(), center_now, center)
