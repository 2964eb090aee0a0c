"""The original's correspondence measure on planted features of a view and its noisy mirror image."""

import pytest
import torch

from esvit.evaluation.correspondence import Cells, match, mirrored, scores, tally
from tests.golden.cases import Goldens

SIDE, PAIRS = 224, 10


@pytest.mark.parametrize(("model", "rows"), [("swin_tiny", 7), ("deit_small", 14)])
@pytest.mark.parametrize(("level", "noise"), [(0, "0"), (1, "0.8"), (2, "2")])
def test_accuracy_error_and_similarity_equal_the_original(goldens: Goldens, model: str, rows: int, level: int, noise: str) -> None:
    accuracy, error_pixels, similarity_of_the_11th = goldens.case("correspondence")[f"{model}_noise{noise}"].tolist()
    one = goldens.input(f"corr_f1_{rows}", (rows, rows, 16))
    two = one.flip(1) + float(noise) * goldens.input(f"corr_n{level}_{rows}", (rows, rows, 16))
    cells = Cells((rows, rows), SIDE)
    matches = match(one.view(1, -1, 16), two.view(1, -1, 16))
    score = scores(tally(matches, mirrored(cells.centres(), SIDE)[None], torch.ones(1).double(), cells, pairs=PAIRS))["top"]
    assert round(score.accuracy * PAIRS / 100) == round(accuracy * PAIRS)
    assert score.error_pixels == pytest.approx(error_pixels, abs=1e-3)
    ranked = matches.similarity[0].sort(descending=True).values
    assert ranked[PAIRS].item() == pytest.approx(similarity_of_the_11th, abs=1e-5)
    assert score.similarity == pytest.approx(ranked[:PAIRS].mean().item(), abs=1e-5)
