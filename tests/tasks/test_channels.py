"""Images that are not RGB, from the file to an accuracy and to a loss; and options of channels that contradict each other."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from esvit.augmentations.evaluation import Normalize
from esvit.data.folder import FolderData
from esvit.errors import OptionError
from esvit.evaluation.frozen import hash_of_images
from esvit.evaluation.splits import require_rgb
from esvit.run_folder import RunFolder
from esvit.tasks.knn import Knn
from esvit.tracking.base import NoTracking
from run import build
from tests.command_line.commands import TINY, losses
from tests.data.pictures import data_options
from tests.tasks.colours import MeanColour, evaluate, frozen, one_process
from tests.tasks.composition import composed

CHANNELS = 5


class MeanOfFive(MeanColour):
    def __init__(self) -> None:
        super().__init__()
        self.dim, self.block_dims = CHANNELS, [CHANNELS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Arrays of 16 bits whose class is in the low byte of the last channel alone: neither 8 bits nor three channels show it."""
    root = tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, level in (("dark", 32768), ("light", 32768 + 100)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                values = np.full((40, 40, CHANNELS), 32768, dtype=np.uint16)
                values[:, :, -1] = level + rng.integers(0, 5)
                np.save(root / split / name / f"{number}.npy", values)
    return root


def five_channels(folder: Path, **changed) -> FolderData:
    options = {"root": str(folder / "train"), "val_root": str(folder / "val"), "channels": CHANNELS, "depth": 16, "batch_size": 4}
    return FolderData(**data_options(**options | changed))


def test_a_class_in_the_low_byte_of_the_fifth_channel_is_found(folder, tmp_path):
    network = frozen(backbone=MeanOfFive(), normalize=Normalize(mean=[0.5] * CHANNELS, std=[0.001] * CHANNELS))
    task = Knn(neighbours=[3], temperature=0.07, baselines=False, frozen=network, data=five_channels(folder))
    assert evaluate(task, tmp_path / "run")["knn/top1_k3"] == pytest.approx(100)


def test_pretraining_takes_them(folder, tmp_path):
    means = "[0.5,0.5,0.5,0.5,0.5]"
    options = composed(*TINY, f"data.root={folder}/train", f"data.channels={CHANNELS}", "data.depth=16", f"backbone.in_channels={CHANNELS}",
                       f"task.normalize.mean={means}", f"task.normalize.std={means}", "max_steps=2")  # fmt: skip
    with one_process() as runtime:
        runtime.records_to(RunFolder(tmp_path), tracking=NoTracking(host=None), config=options["chosen"])
        build(options["task"]).run(runtime)
    assert all(math.isfinite(record["loss/total"]) for record in losses(tmp_path))
    assert (tmp_path / "crops.png").exists()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=False)["step"] == 2


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (["data.channels=1"], r"task\.normalize\.mean: .* 3 means, the images have data\.channels=1"),
        (
            ["data.channels=1", "task.normalize.mean=[0.5]", "task.normalize.std=[0.5]"],
            r"backbone\.in_channels: does not fit images of data\.channels=1 .*use backbone\.in_channels=1",
        ),
        (["backbone.in_channels=4"], r"backbone\.in_channels: does not fit images of data\.channels=3"),
    ],
)
def test_pretraining_with_contradictory_channels_is_told_before_any_work(folder, tmp_path, changes, found):
    options = composed(*TINY, f"data.root={folder}/train", *(changes if "data.channels=1" in changes else ["data.depth=16", *changes]))
    with one_process() as runtime, pytest.raises(OptionError, match=f"^{found}[^\n]*$"):
        runtime.records_to(RunFolder(tmp_path), tracking=NoTracking(host=None), config=options["chosen"])
        build(options["task"]).run(runtime)
    assert not list(tmp_path.iterdir())


def test_evaluations_with_contradictory_channels_are_told_before_any_work(folder, tmp_path):
    options = {"neighbours": [3], "temperature": 0.07, "data": five_channels(folder)}
    with pytest.raises(OptionError, match=r"^task\.normalize\.mean: [^\n]* 3 means, the images have data\.channels=5"):
        evaluate(Knn(frozen=frozen(), baselines=False, **options), tmp_path)
    with pytest.raises(OptionError, match=r"^task\.baselines: colour histograms are of RGB"):
        evaluate(Knn(frozen=frozen(), baselines=True, **options), tmp_path)
    with pytest.raises(OptionError, match=r"^data\.channels: 5, but task=x works on RGB images"):
        require_rgb(five_channels(folder), task="task=x")
    with pytest.raises(OptionError, match=r"^data\.depth: 16, but task=x works on RGB images"):
        require_rgb(five_channels(folder, channels=3), task="task=x")
    assert not list(tmp_path.iterdir())


def test_kept_features_of_other_depths_are_others(folder):
    hashes = {hash_of_images(five_channels(folder, depth=depth).train()) for depth in (8, 16)}
    assert len(hashes) == 2
