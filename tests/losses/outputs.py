"""Random network outputs for tests of the losses: small, unnormalised, with rectangular grids and several crop sizes."""

import torch
from torch import Tensor

from esvit.records import NetworkOutput, PrototypeWeights


class Batch:
    """Outputs of one step, whose student tensors and all prototype matrices ask for gradients.

    regions  number N of regions of each student crop, and of each teacher view
    """

    def __init__(
        self,
        regions: tuple[list[int], list[int]],
        *,
        images: int = 3,
        width: int = 6,
        embedding: int = 5,
        prototypes: int = 37,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        def output(count: int) -> NetworkOutput:
            return NetworkOutput(
                view=noise(images, embedding).requires_grad_(),
                region=noise(images, count, embedding).requires_grad_(),
                features=noise(images, count, width).requires_grad_(),
                pooled=noise(images, width),
            )

        def matrices() -> PrototypeWeights:
            return PrototypeWeights(
                view=noise(prototypes, embedding).requires_grad_(), region=noise(prototypes, embedding).requires_grad_()
            )

        self.student = [output(count) for count in regions[0]]
        self.teacher = [output(count) for count in regions[1]]
        self.student_prototypes = matrices()
        self.teacher_prototypes = matrices()
        self.center = noise(1, prototypes)
        self.center_region = noise(1, prototypes)
        self.mixing = noise(len(self.student), images, images).abs()  # rows do not sum to 1
        self.mixing[:, 0, 1] = 0

    def student_tensors(self) -> list[Tensor]:
        """Everything a gradient must reach: embeddings and prototypes of the student."""
        embeddings = [tensor for output in self.student for tensor in (output.view, output.region)]
        return [tensor for tensor in (*embeddings, *_both(self.student_prototypes)) if tensor is not None]

    def other_tensors(self) -> list[Tensor]:
        """Everything a gradient must not reach: the teacher's side, and the features that regions are matched by."""
        teacher = [tensor for output in self.teacher for tensor in (output.view, output.region, output.features)]
        features = [output.features for output in self.student]
        return [tensor for tensor in (*teacher, *features, *_both(self.teacher_prototypes)) if tensor is not None]


def _both(weights: PrototypeWeights) -> tuple[Tensor, Tensor | None]:
    return weights.view, weights.region
