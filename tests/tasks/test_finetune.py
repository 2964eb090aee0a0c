"""task=finetune: learning rates by hand, soft targets, the moving average, a planted set that is easy, and exact resume."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from esvit.augmentations.erasing import RandomErasing
from esvit.augmentations.evaluation import EvaluationCrop, Normalize
from esvit.augmentations.mixing import Mixing
from esvit.augmentations.randaugment import RandAugment
from esvit.augmentations.supervised import RandomResizedCropFlip
from esvit.backbones.swin import Swin
from esvit.data.base import Decoder
from esvit.data.folder import FolderData
from esvit.errors import Interrupted, OptionError
from esvit.evaluation.classifier import Classifier, accuracies, read_classifier
from esvit.evaluation.frozen import Frozen
from esvit.evaluation.splits import labelled_splits
from esvit.optimizers import AdamW
from esvit.published import load_backbone
from esvit.records import StepValues
from esvit.run_folder import RunFolder
from esvit.runtime import Runtime
from esvit.tasks.finetune import FineTune
from esvit.tasks.finetune_step import FineTuning, MovingAverage, rate_scales, smoothed_targets, soft_cross_entropy
from esvit.tasks.nonfinite import NonFiniteLoss
from esvit.tracking.base import NoTracking
from tests.backbones.networks import micro_resnet
from tests.command_line.commands import differences, losses
from tests.data.pictures import data_options

COLORS = {"blue": (40, 60, 200), "green": (40, 170, 60), "red": (200, 50, 40)}
CONFIG = {"epochs": 4, "max_steps": None}


def backbone() -> Swin:
    """Two blocks of one stage each, for images of 16 pixels."""
    torch.manual_seed(0)
    return Swin(
        in_channels=3, patch_size=4, dim=8, depths=[1, 1], heads=[2, 4], window_size=2, mlp_ratio=2.0, drop_path_rate=0.1, image_size=16
    )  # fmt: skip


def mixing(probability: float, *, mode: Literal["batch", "pair"] = "batch") -> Mixing:
    return Mixing(
        mixup_alpha=0.8, cutmix_alpha=1.0, cutmix_minmax=None, probability=probability, switch_probability=0.5, mode=mode, crops=1
    )


def adamw(learning_rate: float) -> AdamW:
    return AdamW(learning_rate=learning_rate, betas=[0.9, 0.999], eps=1e-8, clip="global", clip_norm=3.0)


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> Path:
    """`train` with eight and `val` with four noisy images of each of three colours."""
    root = tmp_path_factory.mktemp("colors")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, color in COLORS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(color) + rng.normal(0, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def task(colors: Path, **changes: Any) -> FineTune:
    """24 images, four a step in two micro-batches: six steps an epoch, 24 in all."""
    crop = RandomResizedCropFlip(
        size=16, scale=[0.5, 1.0], interpolation="bicubic", flip_probability=0.5, color_jitter=0.1,
        randaugment=RandAugment(layers=0, magnitude=9.0, magnitude_std=0.5, probability=0.5),
        erasing=RandomErasing(probability=0.0, scale=[0.02, 0.33], ratio=0.3, fill="pixel", count=1),
    )  # fmt: skip
    options: dict[str, Any] = {
        "frozen": Frozen(
            backbone=backbone(),
            checkpoint=None,
            network="untrained",
            resize_positions=False,
            normalize=Normalize(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]),
            resize=16,
            crop=16,
            cache=None,
        ),
        "data": FolderData(**data_options(root=str(colors / "train"), val_root=str(colors / "val"), max_bad_fraction=0.0)),
        "training_crop": crop,
        "mixing": mixing(0.5),
        "optimizer": adamw(0.5),
        "label_fraction": 1.0,
        "layer_decay": 1.0,
        "warmup_epochs": 1,
        "final_learning_rate": 1e-5,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
        "ema_momentum": 0.9,
        "accumulation": 2,
        "log_every": 5,
        "validate_every": 1,
        "checkpoint_keep": 9,
        "checkpoint_every": 4,
        "epochs": 4,
        "max_steps": None,
    }
    return FineTune(**(options | changes))


@contextmanager
def runtime(folder: Path) -> Iterator[Runtime]:
    threads = torch.get_num_threads()
    options: dict[str, Any] = {"threads": 1, "timeout_minutes": 1, "stall_minutes": 0}
    try:
        with Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, **options) as one:
            one.records_to(RunFolder(folder), tracking=NoTracking(host=None), config=CONFIG)
            yield one
    finally:
        torch.set_num_threads(threads)


def run(work: FineTune, folder: Path) -> dict[str, float]:
    """metrics.json"""
    with runtime(folder) as one:
        work.run(one)
    return json.loads((folder / "metrics.json").read_text())


def saved(folder: Path, name: str = "checkpoint.pt") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def reference(colors, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted; not to be written to."""
    folder = tmp_path_factory.mktemp("finetune") / "run"
    run(task(colors), folder)
    return folder


def test_each_layer_learns_slower_than_the_one_above():
    assert rate_scales([["patch"], ["first", "merge"], [], ["norm", "head"]], 0.5) == {
        "patch": 0.125, "first": 0.25, "merge": 0.25, "norm": 1.0, "head": 1.0,
    }  # fmt: skip


def test_the_optimizer_takes_each_layers_rate_and_decays_weights_only():
    network = Classifier(backbone(), classes=3)
    scales = rate_scales(network.parameters_by_depth(), 0.5)
    optimizer = adamw(1.0).build(network, precision="fp32", device=torch.device("cpu"), rate_scales=scales, tables_decay=False)
    optimizer.set(StepValues(epoch=0, learning_rate=0.8, weight_decay=0.05, momentum=1.0, temperature=1.0, last_layer_frozen=False))
    rates, decays = {}, {}
    for group, tags in zip(optimizer.optimizer.param_groups, optimizer.groups, strict=True):
        for name in tags.names:
            rates[name], decays[name] = group["lr"], group["weight_decay"]
    assert rates.keys() == dict(network.named_parameters()).keys()
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(0.1)
    assert rates["backbone.layers.0.blocks.0.attn.qkv.weight"] == rates["backbone.layers.0.downsample.reduction.weight"] == 0.2
    assert rates["backbone.layers.1.blocks.0.mlp.fc1.bias"] == 0.4
    assert rates["backbone.norm.weight"] == rates["head.weight"] == rates["head.bias"] == 0.8
    undecayed = {name for name in decays if not decays[name]}
    assert {name for name in decays if name.endswith(("bias", "bias_table", "norm1.weight", "norm.weight"))} <= undecayed
    assert {"head.weight", "backbone.patch_embed.proj.weight", "backbone.layers.1.blocks.0.attn.qkv.weight"} & undecayed == set()
    assert set(decays.values()) == {0.0, 0.05}


def test_smoothing_spreads_its_share_over_all_classes():
    targets = smoothed_targets(torch.tensor([2, 0]), classes=4, smoothing=0.2)
    torch.testing.assert_close(targets, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))


def test_soft_cross_entropy_of_hard_targets_is_the_usual_one():
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])
    hard = smoothed_targets(labels, classes=3, smoothing=0.0)
    torch.testing.assert_close(soft_cross_entropy(logits, hard), torch.nn.functional.cross_entropy(logits, labels))


def tuning(one: Runtime, *, mixes: Mixing | None) -> FineTuning:
    network = Classifier(backbone(), classes=3)
    optimizer = adamw(0.1).build(network, precision="fp32", device=one.device)
    return FineTuning(network=network, average=None, optimizer=optimizer, runtime=one, accumulation=1, mixing=mixes, label_smoothing=0.1)


def test_mixed_targets_sum_to_one_and_hold_the_share_of_each_image(tmp_path):
    crops, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 2])
    with runtime(tmp_path) as one:
        images, targets = tuning(one, mixes=mixing(1.0)).targets(crops, labels, np.random.default_rng(0))
        same, plain = tuning(one, mixes=None).targets(crops, labels, np.random.default_rng(0))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    assert same is crops and not torch.equal(images, crops)
    share = (targets[0, 0] - plain[3, 0]) / (plain[0, 0] - plain[3, 0])  # image 0 is mixed with image 3
    torch.testing.assert_close(targets, share * plain + (1 - share) * plain.flip(0))
    assert 0 < share < 1


def test_the_average_follows_quickly_at_first_and_not_at_all_after_a_bad_step():
    network = Classifier(backbone(), classes=3)
    average = MovingAverage(network, momentum=0.5)
    assert [round(average.momentum_at(step), 3) for step in (0, 1, 8, 100)] == [0.1, 0.182, 0.5, 0.5]
    torch.nn.init.zeros_(average.network.head.bias)
    torch.nn.init.ones_(network.head.bias)
    average.update(network, step=0, finite=torch.tensor(False))
    assert average.network.head.bias.tolist() == [0, 0, 0]
    average.update(network, step=0, finite=torch.tensor(True))
    torch.testing.assert_close(average.network.head.bias, torch.full((3,), 0.9))


def test_the_average_has_the_batch_norm_statistics_of_the_network(tmp_path):
    network = Classifier(micro_resnet(), classes=3)
    average = MovingAverage(network, momentum=0.9)
    with runtime(tmp_path) as one:
        optimizer = adamw(0.1).build(network, precision="fp32", device=one.device)
        both = FineTuning(
            network=network, average=average, optimizer=optimizer, runtime=one, accumulation=1, mixing=None, label_smoothing=0.0
        )  # fmt: skip
        network(torch.rand(2, 3, 32, 32))
        both.settle_buffers()
    statistics = dict(network.named_buffers())
    assert statistics["backbone.bn1.running_mean"].abs().sum() > 0
    assert all(torch.equal(value, statistics[name]) for name, value in average.network.named_buffers())


def test_an_easy_set_is_learned(reference):
    metrics = json.loads((reference / "metrics.json").read_text())
    assert metrics["finetune/top1"] > 90 and metrics["finetune/ema_top1"] > 60  # chance is 33
    assert metrics["finetune/top5"] == 100 and metrics["step"] == 24
    assert metrics["finetune/best_top1"] >= max(metrics["finetune/top1"], metrics["finetune/ema_top1"])
    assert [record["step"] for record in losses(reference) if "finetune/top1" in record] == [6, 12, 18, 24]


def test_the_protocol_pins_what_the_number_depends_on(reference):
    protocol = json.loads((reference / "protocol.json").read_text())
    assert protocol["task"] == "finetune" and protocol["frozen"]["network"] == "untrained"
    assert protocol["images_per_step"] == 4 and protocol["training_crop"]["size"] == 16 and protocol["mixing"]["probability"] == 0.5
    assert protocol["optimizer"]["kind"] == "AdamW" and protocol["label_fraction"] == 1.0


@pytest.mark.parametrize(("network", "metric"), [("student", "finetune/top1"), ("teacher", "finetune/ema_top1")])
def test_the_file_holds_a_classifier_that_scores_the_same_and_a_backbone_for_other_evaluations(
    reference, colors, tmp_path, network, metric
):
    classifier, names = read_classifier(reference / "finetuned.pt", backbone(), network=network)
    assert names == ["blue", "green", "red"]
    with runtime(tmp_path) as one:
        found = accuracies(
            {"it": classifier},
            images=labelled_splits(task(colors).data).validation,
            transform=EvaluationCrop(resize=16, crop=16, option="crop"),
            normalize=task(colors).frozen.normalize,
            batch_size=5,
            workers=0,
            runtime=one,
        )["it"]
    metrics = json.loads((reference / "metrics.json").read_text())
    assert found.top1 == metrics[metric] and found.images == 12
    assert found.loss == pytest.approx(metrics[metric.replace("top1", "loss")], abs=1e-5)

    other = backbone().eval()
    file = load_backbone(other, reference / "finetuned.pt", which=network, resize_positions=False)
    assert file.step == 24 and file.epoch == 4 and file.origin == "this program"
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(other(images).pooled, classifier.backbone(images).pooled)


def test_a_file_without_a_classifier_is_refused(tmp_path):
    torch.save({"model": backbone().state_dict()}, tmp_path / "plain.pt")
    with pytest.raises(OptionError, match="^checkpoint: .*plain.pt' holds no classifier"):
        read_classifier(tmp_path / "plain.pt", backbone(), network="teacher")


class Power(Exception):  # noqa: N818
    """It went off."""


@dataclass(kw_only=True)
class Troubled(FolderData):
    """Something happens when image `at` is read, counted from the first one of the run."""

    at: int
    happens: Callable[[], None]

    def train(self):
        images = super().train()
        read, count = images.read, iter(range(10**6))

        def read_until_trouble(index: int, decode: Decoder | None = None) -> Any:
            if next(count) == self.at:
                self.happens()
            return read(index, decode)

        images.read = read_until_trouble
        return images


def power_fails() -> None:
    raise Power


def is_told_to_stop() -> None:
    signal.raise_signal(signal.SIGUSR2)


@pytest.mark.parametrize(
    ("trouble", "raised", "saved_step"), [(power_fails, Power, 8), (is_told_to_stop, Interrupted, 10)], ids=["power cut", "signal"]
)
def test_a_run_that_was_stopped_within_an_epoch_goes_on_bit_for_bit(trouble, raised, saved_step, reference, colors, tmp_path):
    """In step 10 of 24, of the second epoch; checkpoints are due every four steps."""
    folder = tmp_path / "run"
    data = Troubled(**vars(task(colors).data), at=9 * 4 + 1, happens=trouble)
    with pytest.raises(raised):
        run(task(colors, data=data), folder)
    assert saved(folder)["step"] == saved_step
    metrics = run(task(colors), folder)
    ours, theirs = saved(folder), saved(reference)
    for part in ("student", "teacher", "classifier", "optimizer", "best", "meters", "step"):
        assert differences(ours[part], theirs[part], part) == []
    assert losses(folder) == losses(reference)
    assert metrics == json.loads((reference / "metrics.json").read_text())
    assert differences(saved(folder, "finetuned_best.pt")["student"], saved(reference, "finetuned_best.pt")["student"]) == []


def test_a_resumed_run_needs_the_weights_that_it_began_with_no_more(reference, colors, tmp_path):
    """And its protocol goes on naming them."""
    start = tmp_path / "start.pt"
    torch.save({"model": backbone().state_dict()}, start)
    folder = tmp_path / "run"
    run(begun_with(task(colors, max_steps=2), start), folder)
    before = json.loads((folder / "protocol.json").read_text())["frozen"]
    start.unlink()
    (folder / "metrics.json").unlink()
    run(begun_with(task(colors, max_steps=3), start), folder)
    assert json.loads((folder / "protocol.json").read_text())["frozen"] == before
    assert (
        before["network"] == "teacher" and before["weights"] == json.loads((reference / "protocol.json").read_text())["frozen"]["weights"]
    )


def begun_with(work: FineTune, checkpoint: Path) -> FineTune:
    work.frozen = replace(work.frozen, checkpoint=str(checkpoint), network="teacher")
    return work


@dataclass(kw_only=True)
class Watched(FolderData):
    """Notes the names of the training images that are read."""

    seen: list[str]

    def train(self):
        images = super().train()
        read = images.read

        def note_and_read(index: int, decode: Decoder | None = None) -> Any:
            self.seen.append(images.name(index))
            return read(index, decode)

        images.read = note_and_read
        return images


def test_of_a_fraction_of_the_labels_each_class_has_its_share_and_no_other_image_is_read(colors, tmp_path):
    data = Watched(**vars(task(colors).data), seen=[])
    work = task(colors, data=data, label_fraction=0.25, accumulation=1, epochs=2, validate_every=0, ema_momentum=0.0)
    metrics = run(work, tmp_path / "run")
    assert sorted(Path(name).parent.name for name in set(data.seen)) == ["blue", "blue", "green", "green", "red", "red"]
    assert len(data.seen) == metrics["images_seen"] == 12
    assert "finetune/top1_labels0.25" in metrics and "finetune/ema_top1_labels0.25" not in metrics
    assert "student" in saved(tmp_path / "run", "finetuned.pt") and "teacher" not in saved(tmp_path / "run", "finetuned.pt")


def test_a_loss_that_is_no_number_stops_the_run_with_the_batch(colors, tmp_path):
    work = task(colors, optimizer=adamw(1e30), warmup_epochs=0)
    with pytest.raises(NonFiniteLoss, match=r"^optimizer\.learning_rate: .* not finite in step \d+; .*nonfinite"):
        run(work, tmp_path / "run")
    assert list((tmp_path / "run" / "nonfinite").glob("*.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_fraction": 0.0}, r"task\.label_fraction: 0; use a number above 0, up to 1"),
        ({"layer_decay": 1.5}, r"task\.layer_decay: 1.5; "),
        ({"label_smoothing": 1.0}, r"task\.label_smoothing: 1; use 0 \(off\) to below 1"),
        ({"ema_momentum": -0.1}, r"task\.ema_momentum: -0.1; "),
        ({"warmup_epochs": 5}, r"task\.warmup_epochs: a warm-up of 5 epochs in a training of 4; use 0 to 4"),
        ({"validate_every": -1}, r"task\.validate_every: -1 is too small; use 0 or more"),
        ({"accumulation": 0}, r"task\.accumulation: 0 is too small; use 1 or more"),
        ({"label_fraction": 0.01}, r"data\.batch_size: one step takes 4 images .* but there are 3; "),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(changes, message, colors, tmp_path):
    with pytest.raises(OptionError, match=f"^{message}"):
        run(task(colors, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_odd_batch_cannot_be_mixed_in_pairs(colors, tmp_path):
    data = replace(task(colors).data, batch_size=3)
    with pytest.raises(OptionError, match=r"^data\.batch_size: 3 images cannot be mixed in pairs; "):
        run(task(colors, data=data, mixing=mixing(0.5, mode="pair")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layer_wise_rates_of_an_untrained_network_are_warned_of(colors, tmp_path):
    with pytest.warns(UserWarning, match=r"task\.layer_decay: 0.8 holds back"):
        run(task(colors, layer_decay=0.8, max_steps=1), tmp_path / "run")
