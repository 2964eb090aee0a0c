"""Four training steps of a small Swin, with every loss and optimizer, against the original's."""

import pytest

from tests.backbones.networks import swin
from tests.golden.cases import Goldens
from tests.golden.steps import assert_four_steps_equal


@pytest.mark.parametrize("case", ["view_adamw", "dense_adamw", "dense_sgd", "dense_lars"])
def test_four_training_steps_equal_the_originals(case: str, goldens: Goldens):
    assert_four_steps_equal(goldens, f"train_swin_{case}", swin(), key_biases={".qkv.bias": 3})
