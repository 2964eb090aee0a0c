"""The original's DINOHead, through our projection head and prototypes."""

import pytest
import torch

from esvit.heads import ProjectionHead, Prototypes
from tests.golden.cases import Goldens, assert_close


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_head_gives_the_originals_logits(goldens: Goldens, layers: int, batch_norm: bool):
    case = goldens.case("dinohead")
    name = f"nlayers{layers}_bn{int(batch_norm)}"
    head = ProjectionHead(dim=96, hidden_dim=2048, bottleneck_dim=256, layers=layers, batch_norm=batch_norm)
    prototypes = Prototypes(count=64, bottleneck_dim=256, norm_last_layer=False)
    goldens.fill(head, lambda entry: f"head.{entry}")
    goldens.fill(prototypes, lambda entry: f"head.last_layer.{entry}")

    head.eval()
    features = goldens.input("head_in", (5, 96)).requires_grad_()
    logits = head(features) @ prototypes().T
    logits.square().sum().backward()
    assert_close(logits, case[f"{name}_eval"], absolute=5e-6)
    assert_close(features.grad, case[f"{name}_eval_gradin_of_sumsq"], absolute=5e-6)

    if batch_norm and layers > 1:
        head.train()
        with torch.no_grad():
            assert_close(head(features) @ prototypes().T, case[f"{name}_train"], absolute=5e-6)
