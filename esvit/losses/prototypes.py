"""Cross-entropy between prototype assignments of teacher and student, and their centre, without ever keeping K-wide logits.

With student embeddings h_i, matched teacher rows j of weight A_ij, prototypes W (student) and W' (teacher), centre c,
temperatures s (student) and t (teacher):

    q_j   = softmax((W' h'_j - c) / t)                              the target, no gradient
    total = sum_ij A_ij * cross_entropy(q_j, softmax(W h_i / s))
          = sum_i mass_i * logsumexp(W h_i / s)  -  1/s * sum_j pull_j . (q_j W)
    mass_i = sum_j A_ij        pull_j = sum_i A_ij h_i

so the pairs (i, j) meet in E dimensions (`pull`, built by the caller) and each row meets the K prototypes once. Rows are taken
in chunks; because the weight of each row in the total is known beforehand, the chunk that has the softmax at hand also
writes the gradients, all of them (rows, E) or (K, E), and `backward` only scales them. Nothing is computed twice.

Letters: R student rows, S teacher rows, E embedding width, K prototypes.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esvit import distributed

# Size of one chunk of float32 logits (there are two such buffers). CPU: 256 rows of 65,536 prototypes, from where the matrix
# products, each of which reads all prototypes once per chunk, gain no more by more rows. Elsewhere: 1,024 rows, to fill the device.
CPU_CHUNK_BYTES = 64 * 2**20
DEVICE_CHUNK_BYTES = 256 * 2**20


def matching_cross_entropy(
    students: Tensor,
    mass: Tensor,
    pulls: Tensor,
    prototypes: Tensor,
    teachers: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """The `total` of the module's formula, a float32 (or float64) scalar with gradients for students, pulls and prototypes only.

    students (R, E), mass (R,), pulls (S, E), prototypes (K, E), teachers (S, E), teacher_prototypes (K, E), center (1, K).
    Embeddings need not be unit vectors. Under autocast the matrix products run in its dtype, everything else in float32.
    """
    device = students.device.type
    dtype = torch.promote_types(students.dtype, torch.float32)
    product_dtype = dtype
    if torch.is_autocast_enabled(device) and dtype == torch.float32:
        product_dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return _MatchingCrossEntropy.apply(
            students.to(dtype),
            pulls.to(dtype),
            prototypes.to(dtype),
            mass.detach().to(dtype),
            teachers.detach().to(dtype),
            teacher_prototypes.detach().to(dtype),
            center.to(dtype),
            student_temperature,
            teacher_temperature,
            product_dtype,
            torch.is_grad_enabled(),
        )


class _MatchingCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        students: Tensor,
        pulls: Tensor,
        prototypes: Tensor,
        mass: Tensor,
        teachers: Tensor,
        teacher_prototypes: Tensor,
        center: Tensor,
        student_temperature: float,
        teacher_temperature: float,
        product_dtype: torch.dtype,
        grad_enabled: bool,
    ) -> Tensor:
        def gradient_of(index: int, value: Tensor) -> Tensor | None:
            return torch.zeros_like(value) if grad_enabled and ctx.needs_input_grad[index] else None

        students_grad = gradient_of(0, students)
        pulls_grad = gradient_of(1, pulls)
        prototypes_grad = gradient_of(2, prototypes)

        chunks = _Chunks(max(len(students), len(teachers)), prototypes, product_dtype)
        student_matrix = prototypes.to(product_dtype)
        total = students.new_zeros(())
        for rows in chunks.of(students):
            softmax, logsumexp = chunks.softmax(students[rows] / student_temperature, student_matrix)
            total += mass[rows].dot(logsumexp)
            weight = mass[rows, None] / student_temperature
            if students_grad is not None:
                students_grad[rows] = chunks.mix(softmax, student_matrix) * weight
            if prototypes_grad is not None:
                chunks.add_outer(prototypes_grad, softmax, students[rows] * weight)

        teacher_matrix = teacher_prototypes.to(product_dtype)
        shift = center / teacher_temperature
        for rows in chunks.of(teachers):
            targets, _ = chunks.softmax(teachers[rows] / teacher_temperature, teacher_matrix, shift)
            expected = chunks.mix(targets, student_matrix) / -student_temperature  # q_j W, the target's mean prototype
            total += pulls[rows].flatten().dot(expected.flatten())
            if pulls_grad is not None:
                pulls_grad[rows] = expected
            if prototypes_grad is not None:
                chunks.add_outer(prototypes_grad, targets, pulls[rows] / -student_temperature)

        ctx.save_for_backward(students_grad, pulls_grad, prototypes_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        gradients = [None if gradient is None else gradient * scale for gradient in ctx.saved_tensors]
        return *gradients, *[None] * 8


class _Chunks:
    """The two buffers of (rows, K) float32 that all chunks share, and the four operations on them.

    Float16 alone needs care: its normal numbers end at 6e-5 and 65,504, and a probability of a 65,536-way softmax as well as
    the weight of one row in the total are below. Both are scaled up, so far that their product, summed over a chunk, still fits.
    """

    def __init__(self, most_rows: int, prototypes: Tensor, product_dtype: torch.dtype):
        budget = CPU_CHUNK_BYTES if prototypes.device.type == "cpu" else DEVICE_CHUNK_BYTES
        count = len(prototypes)
        self.rows = min(most_rows, max(1, budget // (4 * count)))
        self.logits = prototypes.new_empty(self.rows, count)
        self.probabilities = prototypes.new_empty(self.rows, count)
        self.product_dtype = product_dtype
        self.is_exact = product_dtype == prototypes.dtype
        self.lift = 2.0**15 / self.rows if product_dtype == torch.float16 else 1.0

    def of(self, tensor: Tensor) -> list[slice]:
        return [slice(start, start + self.rows) for start in range(0, len(tensor), self.rows)]

    def softmax(self, embeddings: Tensor, matrix: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Softmax (rows, K) over the logits `embeddings @ matrix.T - shift`, and their logsumexp (rows,).

        The softmax holds until the next call; it comes in the dtype of the products and times `lift`, ready for them.
        """
        logits = self.logits[: len(embeddings)]
        if self.is_exact:
            torch.mm(embeddings, matrix.T, out=logits)
        else:
            logits.copy_(embeddings.to(self.product_dtype) @ matrix.T)
        if shift is not None:
            logits.sub_(shift)
        probabilities = self.probabilities[: len(embeddings)]
        torch.softmax(logits, dim=1, out=probabilities)
        # The largest logit is also its own probability's logarithm plus the logsumexp: cheaper than a second sum of exponentials.
        logsumexp = logits.amax(dim=1) - probabilities.amax(dim=1).log()
        if self.lift != 1:
            probabilities.mul_(self.lift)
        return probabilities.to(self.product_dtype), logsumexp

    def mix(self, softmax: Tensor, matrix: Tensor) -> Tensor:
        """(rows, E): the mean prototype under each row's softmax."""
        return (softmax @ matrix).to(self.logits.dtype) / self.lift

    def add_outer(self, gradient: Tensor, softmax: Tensor, values: Tensor) -> None:
        """gradient (K, E) += softmax.T @ values (rows, E), accumulated in float32."""
        if self.is_exact:
            gradient.addmm_(softmax.T, values)
        elif self.product_dtype == torch.float16:
            peak = values.abs().amax().clamp_min(torch.finfo(values.dtype).tiny)
            gradient += (softmax.T @ (values / peak).half()).float() * (peak / self.lift)
        else:
            gradient += softmax.T @ values.to(self.product_dtype)


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
