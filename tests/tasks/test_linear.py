"""task=linear: planted answers, a sweep that chooses by held-out images, stopped runs that end as if nothing had happened, and mistakes."""

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from esvit.augmentations.erasing import RandomErasing
from esvit.augmentations.evaluation import Normalize
from esvit.augmentations.randaugment import RandAugment
from esvit.augmentations.supervised import RandomResizedCropFlip
from esvit.backbones.base import Backbone, Stage
from esvit.data.base import Decoder, ImageSet
from esvit.data.folder import FolderData
from esvit.errors import Interrupted, OptionError
from esvit.evaluation.frozen import Frozen
from esvit.evaluation.protocol import protocol_differences
from esvit.run_folder import RunFolder
from esvit.runtime import Runtime
from esvit.tasks.linear import Linear
from esvit.tracking.base import NoTracking
from tests.backbones.networks import Convolutions
from tests.command_line.commands import checkpoint, differences, losses
from tests.data.pictures import data_options

COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}
PER_CLASS = 8  # 24 training images: with batches of four, six steps an epoch where nothing is held out
SIDE = 16


class MeanColour(Backbone):
    """Two blocks that change nothing of the pixels: the pooled feature is an image's mean colour, and a class token in front is grey."""

    def __init__(self, class_token: bool = False):
        super().__init__()
        self.dim = 3
        self.block_dims = [3, 3]
        self.norm = nn.Identity()
        self.class_token = class_token

    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        cells = nn.functional.avg_pool2d(images, 4)
        tokens = cells.flatten(2).transpose(1, 2)
        if self.class_token:
            tokens = torch.cat([torch.zeros(len(images), 1, 3), tokens], dim=1)
        return [Stage([tokens] if last_only else [tokens] * 3, (cells.shape[2], cells.shape[3]))]


class EventfulFolder(FolderData):
    """Image files, with an event before the training image that is read as number `at` of all."""

    def __init__(self, *, at: int, event: Callable[[], None], **options: Any):
        super().__init__(**options)
        self.at, self.event = at, event

    def train(self) -> ImageSet:
        return _Eventful(super().train(), self.at, self.event)


class _Eventful(ImageSet):
    def __init__(self, images: ImageSet, at: int, event: Callable[[], None]):
        self.images, self.at, self.event, self.reads = images, at, event, 0
        self.labels, self.class_names = images.labels, images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, decode: Decoder | None = None) -> Any:
        self.reads += 1
        if self.reads == self.at:
            self.event()
        return self.images.read(index, decode)

    def name(self, index: int) -> str:
        return self.images.name(index)


def paint(folder: Path, per_class: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.clip(np.array(colour) + rng.integers(-40, 40, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red, green and blue images; among the six validation images a green one is called red."""
    root = tmp_path_factory.mktemp("colours")
    paint(root / "train", PER_CLASS, seed=0)
    paint(root / "val", 2, seed=1)
    os.replace(root / "val" / "green" / "1.png", root / "val" / "red" / "another.png")
    return root


def options(colours: Path, **changes: Any) -> dict[str, Any]:
    frozen = Frozen(
        backbone=changes.pop("backbone", None) or MeanColour(), checkpoint=None, network="untrained", resize_positions=False, resize=SIDE,
        crop=SIDE, cache=None, normalize=Normalize(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]),
    )  # fmt: skip
    crop = RandomResizedCropFlip(
        size=SIDE, scale=[0.2, 1.0], interpolation="bilinear", flip_probability=0.5, color_jitter=0.0,
        randaugment=RandAugment(layers=0, magnitude=9.0, magnitude_std=0.5, probability=0.5),
        erasing=RandomErasing(probability=0.0, scale=[0.02, 0.33], ratio=0.3, fill="pixel", count=1),
    )  # fmt: skip
    given = {
        "features": "cached", "learning_rates": [10.0], "blocks": [1], "pooling": ["pooled"], "held_out": 0.25, "label_fraction": 1.0,
        "training_crop": crop, "frozen": frozen, "data": FolderData(**folders(colours)), "epochs": 3,
    }  # fmt: skip
    return given | changes


def folders(colours: Path) -> dict[str, Any]:
    train, val = str(colours / "train"), str(colours / "val")
    return data_options(root=train, val_root=val, batch_size=4)


def evaluate(folder: Path, given: dict[str, Any], seed: int = 0) -> dict[str, float]:
    """metrics.json of a run."""
    threads = torch.get_num_threads()
    settings: dict[str, Any] = {"device": "cpu", "precision": "fp32", "deterministic": None, "threads": 1}
    with Runtime(**settings, seed=seed, timeout_minutes=1, stall_minutes=0) as runtime:
        runtime.records_to(RunFolder(folder), tracking=NoTracking(host=None), config={"epochs": 3, "max_steps": None})
        try:
            Linear(**given).run(runtime)
        finally:
            torch.set_num_threads(threads)
    return json.loads((folder / "metrics.json").read_text())


def protocol(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "protocol.json").read_text())


def assert_same_end(ours: Path, theirs: Path) -> None:
    assert differences(checkpoint(ours), checkpoint(theirs)) == []
    assert losses(ours) == losses(theirs)
    for name in ("metrics.json", "probes.csv", "protocol.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_colours_are_told_apart_but_for_the_image_with_a_wrong_name(features, colours, tmp_path):
    metrics = evaluate(tmp_path, options(colours, features=features))
    assert metrics["linear/top1"] == pytest.approx(100 * 5 / 6)
    assert metrics["linear/top5"] == 100  # three classes
    assert (metrics["linear/train_images"], metrics["linear/validation_images"], metrics["step"]) == (24, 6, 18)
    assert "linear/held_out_top1" not in metrics
    assert [(record["step"], record["epoch"]) for record in losses(tmp_path)] == [(6, 0), (12, 1), (18, 2)]
    assert losses(tmp_path)[-1]["linear/train_loss"] < 0.1 < losses(tmp_path)[0]["linear/train_loss"]


def test_the_classifier_that_is_left_gives_the_accuracy_that_was_told(colours, tmp_path):
    given = options(colours)
    metrics = evaluate(tmp_path, given)
    saved = torch.load(tmp_path / "classifier.pt", weights_only=True)
    assert (saved["class_names"], saved["blocks"], saved["pooling"]) == (["blue", "green", "red"], 1, "pooled")
    validation = given["data"].validation()
    images = torch.stack([torch.from_numpy(np.array(validation.read(index))).permute(2, 0, 1) for index in range(6)])
    with torch.no_grad():
        predicted = (MeanColour()(given["frozen"].normalize(images)).pooled @ saved["weight"].T + saved["bias"]).argmax(dim=1)
    assert 100 * (predicted.numpy() == validation.labels).mean() == pytest.approx(metrics["linear/top1"])


def test_the_best_of_a_sweep_is_chosen_on_held_out_images_and_alone_meets_the_validation_images(colours, tmp_path, capsys):
    metrics = evaluate(tmp_path, options(colours, learning_rates=[10.0, 1e-6], blocks=[2, 1]))
    assert metrics["linear/learning_rate"] == 10 and metrics["linear/held_out_top1"] == 100
    assert (metrics["linear/train_images"], metrics["linear/held_out_images"]) == (18, 6)
    assert metrics["linear/top1"] == pytest.approx(100 * 5 / 6)
    with (tmp_path / "probes.csv").open() as file:
        probes = list(csv.DictReader(file))
    assert [(each["learning_rate"], each["blocks"]) for each in probes] == [("1e-06", "1"), ("10", "1"), ("1e-06", "2"), ("10", "2")]
    assert [each["chosen"] for each in probes] == ["0", "1", "0", "0"]  # of equal ones the first
    assert min(float(each["held_out_top1"]) for each in probes) < 100
    told = capsys.readouterr().out
    assert "the largest learning rate won" in told and "learning_rates=[10] blocks=[1] pooling=[pooled]" in told


def test_a_probe_that_diverges_is_not_chosen_and_disturbs_no_other(colours, tmp_path):
    evaluate(tmp_path / "alone", options(colours, learning_rates=[10.0, 1.0]))
    metrics = evaluate(tmp_path / "beside", options(colours, learning_rates=[2e40, 10.0, 1.0]))
    assert metrics["linear/learning_rate"] in (1, 10)
    alone, beside = losses(tmp_path / "alone")[-1], losses(tmp_path / "beside")[-1]
    assert not np.isfinite(float(beside["linear_train_loss/lr2e+40_blocks1_pooled"]))
    for name in ("linear_train_loss/lr10_blocks1_pooled", "linear_held_out_top1/lr10_blocks1_pooled"):
        assert beside[name] == alone[name]


def test_the_mean_of_the_regions_tells_what_a_poor_class_token_does_not(colours, tmp_path):
    poor = evaluate(tmp_path / "poor", options(colours, backbone=MeanColour(class_token=True)))
    rich = evaluate(tmp_path / "rich", options(colours, backbone=MeanColour(class_token=True), pooling=["pooled_and_regions"]))
    assert poor["linear/top1"] <= 50 < rich["linear/top1"]
    assert rich["linear/with_regions"] == 1


def test_a_fraction_of_the_labels_is_that_of_every_class(colours, tmp_path):
    metrics = evaluate(tmp_path, options(colours, label_fraction=0.5))
    assert metrics["linear/train_images"] == 12
    assert protocol(tmp_path)["images"] == {"train": 12, "held_out": 0, "validation": 6}


def test_results_of_equal_protocols_compare_whatever_a_sweep_chose(colours, tmp_path):
    sweep = {"learning_rates": [0.1, 10.0]}
    for name, changes in (("one", {}), ("other", {"backbone": Convolutions(False)}), ("longer", {"epochs": 4})):
        evaluate(tmp_path / name, options(colours, **sweep, **changes))
    one, other, longer = (protocol(tmp_path / name) for name in ("one", "other", "longer"))
    other["chosen"]["learning_rate"] = 0.1
    assert one["frozen"]["weights"] != other["frozen"]["weights"]
    assert protocol_differences(one, other) == {}
    assert protocol_differences(one, longer) == {"epochs": (3, 4)}


# ---------------------------------------------------------------------------------------------------- stopped and killed


def interrupted_options(colours: Path, at: int, event: Callable[[], None]) -> dict[str, Any]:
    """A sweep of augmented features. The held-out images are read first, six of them; then 16 for each of the epochs' four steps."""
    return options(colours, features="augmented", learning_rates=[1.0, 10.0], data=EventfulFolder(**folders(colours), at=at, event=event))


@pytest.fixture(scope="module")
def uninterrupted(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    evaluate(folder, interrupted_options(colours, 0, lambda: None))
    return folder


def test_a_signal_saves_the_very_step_and_the_run_ends_as_if_there_had_been_none(colours, uninterrupted, tmp_path):
    in_the_sixth_step = 6 + 5 * 4 + 1
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 6, checkpoint written"):
        evaluate(tmp_path, interrupted_options(colours, in_the_sixth_step, lambda: signal.raise_signal(signal.SIGTERM)))
    assert checkpoint(tmp_path)["step"] == 6 and not (tmp_path / "metrics.json").exists()
    evaluate(tmp_path, interrupted_options(colours, 0, lambda: None))
    assert_same_end(tmp_path, uninterrupted)


class PowerFailure(Exception):
    pass


def fail() -> None:
    raise PowerFailure


def test_a_killed_run_goes_on_from_the_last_epoch_and_ends_as_if_it_had_not_been(colours, uninterrupted, tmp_path):
    in_the_tenth_step = 6 + 9 * 4 + 1
    with pytest.raises(PowerFailure):
        evaluate(tmp_path, interrupted_options(colours, in_the_tenth_step, fail))
    assert checkpoint(tmp_path)["step"] == 8
    evaluate(tmp_path, interrupted_options(colours, 0, lambda: None))
    assert_same_end(tmp_path, uninterrupted)


def test_a_run_goes_on_with_batches_of_the_same_size_only(colours, tmp_path):
    with pytest.raises(PowerFailure):
        evaluate(tmp_path, interrupted_options(colours, 6 + 4 * 4 + 1, fail))
    with pytest.raises(OptionError, match=r"^launcher.processes: a step now has 2 images, the run so far had 4"):
        evaluate(
            tmp_path,
            options(colours, features="augmented", learning_rates=[1.0, 10.0], data=FolderData(**folders(colours) | {"batch_size": 2})),
        )


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("task.learning_rates", {"learning_rates": []}),
        ("task.learning_rates", {"learning_rates": [0.1, 0.1]}),
        ("task.learning_rates", {"learning_rates": [0.0]}),
        ("task.blocks", {"blocks": []}),
        ("task.blocks", {"blocks": [0]}),
        ("task.blocks", {"blocks": [1, 3]}),
        ("task.pooling", {"pooling": ["max"]}),
        ("task.pooling", {"pooling": ["pooled_and_regions"]}),
        ("task.features", {"features": "fresh"}),
        ("task.label_fraction", {"label_fraction": 0.0}),
        ("task.label_fraction", {"label_fraction": 1.5}),
        ("task.held_out", {"held_out": 1.0}),
        ("task.held_out", {"held_out": 0.0, "blocks": [1, 2]}),
        ("task.held_out", {"label_fraction": 0.1, "blocks": [1, 2]}),
        ("epochs", {"epochs": 0}),
        ("data.batch_size", {"label_fraction": 0.1}),
        ("data.batch_size", {"label_fraction": 0.1, "features": "augmented"}),
    ],
)
def test_an_impossible_option_is_named_before_anything_is_written(option, changes, colours, tmp_path):
    with pytest.raises(OptionError, match=f"^{option}: "):
        evaluate(tmp_path / "run", options(colours, **changes))
    assert not (tmp_path / "run").exists()


def test_training_that_diverges_in_every_probe_ends_with_the_remedy(colours, tmp_path):
    with pytest.raises(OptionError, match=r"^task\.learning_rates: no probe has a finite loss after 6 of 18 steps; use smaller ones"):
        evaluate(tmp_path, options(colours, learning_rates=[2e40]))


def test_images_without_labels_are_refused(colours, tmp_path):
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "loose" / "0.png")
    data = FolderData(**folders(colours) | {"root": str(tmp_path / "loose"), "val_root": str(tmp_path / "loose")})
    with pytest.raises(OptionError, match=r"^data\.root: its images have no labels"):
        evaluate(tmp_path / "run", options(colours, data=data))
