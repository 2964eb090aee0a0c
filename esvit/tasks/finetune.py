"""`task=finetune`: trains the whole backbone, with a linear layer on top, to name the classes of labelled images.

The recipe is that of DeiT (Touvron et al. 2021) with the layer-wise learning rates of BEiT (Bao et al. 2022): AdamW, linear warm-up and
cosine, mixup and CutMix, label smoothing, a moving average of the weights. The backbone begins with the weights of a checkpoint, or,
supervised from scratch, with `frozen.network=untrained`.

Unusual: every random draw is keyed as in pre-training, so that a resumed run repeats bit for bit what it would have done. What counts is
the last network; the best one of all validations is kept too, and was chosen on the very images that it is judged on.
"""

import contextlib
import itertools
import time
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esvit import distributed
from esvit.augmentations.mixing import Mixing
from esvit.augmentations.supervised import RandomResizedCropFlip
from esvit.checkpoints import CheckpointFolder, has_checkpoint
from esvit.data.bad_images import BadImages
from esvit.data.base import Data, ImageSet
from esvit.data.loading import TrainLoader
from esvit.data.subsets import Subset, stratified_fraction
from esvit.errors import Interrupted, OptionError
from esvit.evaluation.classifier import Accuracy, Classifier, accuracies, classifier_state, load_classifier_state, write_classifier
from esvit.evaluation.figures import Panel, curves_svg
from esvit.evaluation.frozen import Frozen, FrozenBackbone, hash_of_images
from esvit.evaluation.protocol import write_protocol
from esvit.evaluation.splits import Splits, labelled_splits
from esvit.optimizers import LARS, SGD, AdamW
from esvit.records import Views
from esvit.run_folder import RunFolder
from esvit.runtime import Runtime, warn_of_thread_change
from esvit.schedules import Schedules, scaled_learning_rate
from esvit.tasks.finetune_step import FineTuning, MovingAverage, rate_scales
from esvit.tasks.meter import Meter
from esvit.tasks.nonfinite import NonFiniteLoss, save_bad_batch
from esvit.tracking.base import EVALUATED_STEP, Tracker
from esvit.tracking.console import Progress
from esvit.tracking.system import SystemMonitor

LAST, BEST = "finetuned.pt", "finetuned_best.pt"
CURVES = {
    "accuracy.svg": Panel("Accuracy", "", "validation top-1 (%)", {"weights": "finetune/top1", "moving average": "finetune/ema_top1"}),
    "loss.svg": Panel("Loss", "", "cross-entropy (nats)", {"training": "loss/total", "validation": "finetune/loss"}),
}


@dataclass(kw_only=True)
class FineTune:
    """The parts of a fine-tuning; every field is an option or is built from a config group.

    frozen               the weights to begin with (they do not stay frozen), and how validation images are cropped
    label_fraction       share of each class's training images that is used, drawn from the run's seed
    layer_decay          learning rate of a layer over that of the layer above it; 1 for the same everywhere
    warmup_epochs        of the learning rate, linear from 0
    final_learning_rate  where its cosine ends; not scaled with the number of images
    weight_decay         of the weights of layers; biases, norms, tokens and tables of positions have none
    label_smoothing      share of a target that is spread over all classes
    ema_momentum         of the moving average of the weights; 0 keeps none
    accumulation         micro-batches per optimizer step
    log_every            optimizer steps between log records
    validate_every       epochs between validations; 0 means at the end only
    checkpoint_every     optimizer steps between checkpoints, of which `checkpoint_keep` are kept
    max_steps            stop after so many optimizer steps, with schedules of full length; None means at the end
    """

    frozen: Frozen
    data: Data
    training_crop: RandomResizedCropFlip
    mixing: Mixing
    optimizer: AdamW | SGD | LARS
    label_fraction: float
    layer_decay: float
    warmup_epochs: int
    final_learning_rate: float
    weight_decay: float
    label_smoothing: float
    ema_momentum: float
    accumulation: int
    log_every: int
    validate_every: int
    checkpoint_keep: int
    checkpoint_every: int
    epochs: int
    max_steps: int | None

    def run(self, runtime: Runtime) -> None:
        """Train to the end, from the run folder's checkpoint where there is one.

        Raises OptionError before any work for options that cannot work, Interrupted after a signal (state saved),
        and NonFiniteLoss with a report when the loss is no number.
        """
        self._check()
        run = _Run(self, runtime)
        with runtime.recording() as tracker:
            run.run(tracker)

    def _check(self) -> None:
        for option, value, least in (
            ("epochs", self.epochs, 1),
            ("max_steps", 1 if self.max_steps is None else self.max_steps, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("task.accumulation", self.accumulation, 1),
            ("task.log_every", self.log_every, 1),
            ("task.checkpoint_keep", self.checkpoint_keep, 1),
            ("task.validate_every", self.validate_every, 0),
            ("task.weight_decay", self.weight_decay, 0),
            ("task.final_learning_rate", self.final_learning_rate, 0),
        ):
            if value < least:
                raise OptionError(option, f"{value:g} is too small", f"use {least} or more")
        if not 0 <= self.warmup_epochs <= self.epochs:
            found = f"a warm-up of {self.warmup_epochs} epochs in a training of {self.epochs}"
            raise OptionError("task.warmup_epochs", found, f"use 0 to {self.epochs}")
        for option, share in (("task.label_fraction", self.label_fraction), ("task.layer_decay", self.layer_decay)):
            if not 0 < share <= 1:
                raise OptionError(option, f"{share:g}", "use a number above 0, up to 1")
        for option, share in (("task.label_smoothing", self.label_smoothing), ("task.ema_momentum", self.ema_momentum)):
            if not 0 <= share < 1:
                raise OptionError(option, f"{share:g}", "use 0 (off) to below 1")
        if self.mixing.is_on:  # has objections of its own to a batch
            self.mixing([torch.zeros(self.data.batch_size, 1, 1, 1)], np.random.default_rng(0))
        if self.frozen.network == "untrained" and self.layer_decay < 1:
            warnings.warn(
                f"task.layer_decay: {self.layer_decay:g} holds back the first layers of an untrained network; a fair baseline has 1",
                stacklevel=2,
            )


class _Run:
    """One run of a `FineTune`, with everything built."""

    def __init__(self, task: FineTune, runtime: Runtime):
        self.task = task
        self.runtime = runtime
        self.splits = _with_fraction(labelled_splits(task.data), task.label_fraction, runtime.seed)
        self.images: ImageSet = self.splits.train
        assert self.images.labels is not None
        self.labels = torch.from_numpy(self.images.labels)
        self.loader = TrainLoader(
            images=self.images,
            transform=task.training_crop,
            batch_size=task.data.batch_size,
            workers=task.data.workers,
            seed=runtime.seed,
            rank=runtime.rank,
            world_size=runtime.world_size,
            accumulation=task.accumulation,
            max_bad_fraction=task.data.max_bad_fraction,
        )
        self.schedules = _schedules(task, self.loader)
        self.stop = min(self.schedules.total_steps, task.max_steps or self.schedules.total_steps)
        self.start = self._load()
        self._check_training_crop()
        network = Classifier(self.start.backbone.requires_grad_(True), classes=len(self.splits.class_names)).to(runtime.device).train()
        if runtime.world_size > 1 and runtime.device.type == "cuda":
            network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.rate_scales = rate_scales(network.parameters_by_depth(), task.layer_decay)
        self.tuning = FineTuning(
            network=network,
            average=MovingAverage(network, momentum=task.ema_momentum) if task.ema_momentum else None,
            optimizer=task.optimizer.build(
                network, precision=runtime.precision, device=runtime.device, rate_scales=self.rate_scales, tables_decay=False
            ),
            runtime=runtime,
            accumulation=task.accumulation,
            mixing=task.mixing if task.mixing.is_on else None,
            label_smoothing=task.label_smoothing,
        )
        self.protocol = self._protocol()
        self.meter = Meter(runtime.device)
        self.best: dict[str, Any] = {"top1": -1.0, "epoch": 0, "network": ""}
        self.unreadable: list[str] = []  # names of images met here since the last record

    def run(self, tracker: Tracker) -> None:
        folder = self.runtime.folder
        self.tracker = tracker
        self.checkpoints = CheckpointFolder(folder, keep=self.task.checkpoint_keep)
        self.bad_images = BadImages(
            folder=folder, image_count=len(self.images), max_bad_fraction=self.task.data.max_bad_fraction, writes=self.runtime.is_main
        )
        self.system = SystemMonitor(folder)
        start, record_is_due = self._resume()
        self.stop = max(self.stop, start)
        self.progress = Progress(total=self.stop, start=start, is_main=self.runtime.is_main)
        self._announce(start)
        if record_is_due:  # the last attempt was stopped before it could validate
            self._record(start)
        try:
            self._train(start)
        finally:
            self.progress.close()
        self._finish()

    def _train(self, start: int) -> None:
        with contextlib.closing(self._on_device(self.loader.from_step(start))) as batches:  # closing ends the loading processes
            self._train_on(batches, start)

    def _train_on(self, batches: Iterator[tuple[Tensor, Tensor]], start: int) -> None:
        for step in range(start, self.stop):
            rng = self.runtime.seed_step(step)
            self.tuning.set_progress(step / self.schedules.total_steps)
            micro_batches = itertools.islice(batches, self.task.accumulation)
            result = self.tuning.step(micro_batches, self.schedules.at(step), step=step, sound=self.meter.finite, rng=rng)
            self.meter.add(result, step=step, images=self.loader.images_per_step)
            self.progress.advance()

            done = step + 1
            signal = self.runtime.stop_signal()
            record_is_due = self._is_record_due(done)
            if record_is_due and not signal:
                self._record(done)
            if signal or done % self.task.checkpoint_every == 0 or done == self.stop:
                self._save(done, record_is_due=record_is_due and bool(signal))
            if signal:
                raise Interrupted(signal, done)

    def _on_device(self, batches: Iterator[Views]) -> Generator[tuple[Tensor, Tensor]]:
        """Normalised crops and labels of each micro-batch; the time spent waiting for the loader goes to the meter."""
        device = self.runtime.device
        while True:
            since = time.perf_counter()
            views = next(batches)
            self.meter.waited(time.perf_counter() - since)
            self.unreadable += views.bad_images
            (crops,) = views.to(device).crops
            yield self.task.frozen.normalize(crops), self.labels[views.indices].to(device, non_blocking=True)

    # ------------------------------------------------------------------ records

    def _is_record_due(self, done: int) -> bool:
        return done % self.task.log_every == 0 or self._is_validation_due(done)

    def _is_validation_due(self, done: int) -> bool:
        steps = self.task.validate_every * self.loader.steps_per_epoch
        return done == self.stop or (steps > 0 and done % steps == 0)

    def _record(self, done: int) -> None:
        """Read the meter, validate where that is due, and log one record for `done` completed steps."""
        now = self.schedules.at(done - 1)
        metrics = _mean_over_ranks(self.meter.read())
        self._stop_if_not_finite()
        self._count_bad_images()
        if self._is_validation_due(done):
            metrics |= self._validate(done, now.epoch + 1)
        metrics |= {
            "schedule/learning_rate": now.learning_rate,
            "memory/peak_gb": self.runtime.peak_memory_gb(),
            "data/bad_images": self.bad_images.count,
        }
        if self.tuning.average is not None:
            metrics["schedule/ema_momentum"] = self.tuning.average.momentum_at(done - 1)
        if self.runtime.is_main:
            metrics |= self.system.metrics()
        self.tracker.log(done, now.epoch, metrics)
        self.progress.show(done, now.epoch, metrics)
        self.meter.restart_clock()

    def _count_bad_images(self) -> None:
        """Every rank counts what all ranks met, so that all stop together when it is too much."""
        self.bad_images.add(itertools.chain.from_iterable(distributed.gather_objects(self.unreadable)))
        self.unreadable = []

    def _validate(self, done: int, epochs: int) -> dict[str, float]:
        """Accuracies of the weights and of their average, and the file of the best so far."""
        tuning = self.tuning
        tuning.settle_buffers()
        networks = {"student": tuning.network} if tuning.average is None else {"student": tuning.network, "teacher": tuning.average.network}
        tuning.network.eval()
        found = accuracies(
            networks,
            images=self.splits.validation,
            transform=self.start.transform,
            normalize=self.start.normalize,
            batch_size=self.task.data.batch_size,
            workers=self.task.data.workers,
            runtime=self.runtime,
        )
        tuning.network.train()
        for network, accuracy in found.items():
            if accuracy.top1 > self.best["top1"]:
                self.best = {"top1": accuracy.top1, "epoch": epochs, "network": network, "step": done}
        if self.best.get("step") == done and self.runtime.is_main:
            write_classifier(self.runtime.folder / BEST, self._networks() | self._origin(done))
        return _as_metrics(found["student"], "") | (_as_metrics(found["teacher"], "ema_") if "teacher" in found else {})

    def _stop_if_not_finite(self) -> None:
        step = self.meter.first_bad_step()
        if step is None:
            return
        bad_ranks = [rank for rank, bad in enumerate(distributed.gather_objects(self.meter.was_bad_here())) if bad]
        saved = None
        if self.runtime.rank in (bad_ranks or [0]):  # no rank's loss was bad: the gradient was, which all ranks share
            saved = save_bad_batch(folder=self.runtime.folder, rank=self.runtime.rank, step=step, loader=self.loader, images=self.images)
        reports = ", ".join(str(path) for path in distributed.gather_objects(saved) if path is not None)
        raise NonFiniteLoss(
            "optimizer.learning_rate",
            f"loss or gradient was not finite in step {step + 1}; no update was made from there on, the batch is in {reports}",
            "lower it, lengthen task.warmup_epochs, or use precision=bf16 or fp32; the last checkpoint is from before",
        )

    # ------------------------------------------------------------------ checkpoints

    def _save(self, done: int, *, record_is_due: bool) -> None:
        """Write the checkpoint after `done` steps; it is on disk when this returns, on every rank."""
        self._stop_if_not_finite()
        self.tuning.settle_buffers()
        meters = distributed.gather_objects(self.meter.state_dict())
        if self.runtime.is_main:
            self.tracker.sync_to_disk()
            epoch, step_of_epoch = divmod(done, self.loader.steps_per_epoch)
            state = {
                **self._networks(),
                **self._origin(done),
                "optimizer": self.tuning.optimizer.state_dict(),
                "record_is_due": record_is_due,
                "meters": meters,
                "best": self.best,
                "sampler": {
                    "epoch": epoch,
                    "step_of_epoch": step_of_epoch,
                    "images_per_step": self.loader.images_per_step,
                    "images": len(self.images),
                },
                "threads": self.runtime.threads,
                "versions": {name: version(name) for name in ("torch", "torchvision", "numpy")},
            }
            self.checkpoints.save(state, done)
        distributed.barrier()
        self.meter.restart_clock()

    def _networks(self) -> dict[str, Any]:
        average = self.tuning.average
        return classifier_state(
            student=self.tuning.network, average=None if average is None else average.network, class_names=self.splits.class_names
        )

    def _origin(self, done: int) -> dict[str, Any]:
        """What a file of weights says of how they came about."""
        return {"step": done, "epoch": done // self.loader.steps_per_epoch, "protocol": self.protocol, "config": self.config}

    @cached_property
    def config(self) -> dict[str, Any]:
        return RunFolder(self.runtime.folder).config()

    def _resume(self) -> tuple[int, bool]:
        """Completed steps, and whether their record is still due; everything is as it was after them."""
        state = self.checkpoints.load()
        if state is None:
            self.tracker.resume(0)
            return 0, False
        if state["sampler"]["images"] != len(self.images) or state["class_names"] != self.splits.class_names:
            found = f"has {len(self.images)} images of {len(self.splits.class_names)} classes, the run so far had other ones"
            raise OptionError("data.root", found, "give the same images")
        if state["sampler"]["images_per_step"] != self.loader.images_per_step:
            raise OptionError(
                "launcher.processes",
                f"a step now has {self.loader.images_per_step} images, the run so far had {state['sampler']['images_per_step']}",
                "use as many processes as before",
            )
        warn_of_thread_change(state["threads"], self.runtime.threads)
        average = self.tuning.average
        load_classifier_state(state, student=self.tuning.network, average=None if average is None else average.network, option="output_dir")
        self.tuning.optimizer.load_state_dict(state["optimizer"])
        if self.runtime.rank < len(state["meters"]):
            self.meter.load_state_dict(state["meters"][self.runtime.rank])
        self.best = state["best"]
        self.protocol = state["protocol"]
        self.tracker.resume(state["step"])
        return state["step"], state["record_is_due"]

    # ------------------------------------------------------------------ before and after

    def _load(self) -> FrozenBackbone:
        """The backbone to begin with. A resumed run has its own weights: those of `checkpoint` may have gone on, or away."""
        frozen = self.task.frozen
        if has_checkpoint(self.runtime.folder):
            frozen = replace(frozen, network="untrained")
        return frozen.load(self.runtime, channels=self.task.data.channels)

    def _check_training_crop(self) -> None:
        size = self.task.training_crop.size
        try:
            with torch.no_grad():
                self.start.backbone(torch.zeros(1, self.task.data.channels, size, size, device=self.runtime.device))
        except RuntimeError as error:
            found = f"the backbone cannot take crops of {size} pixels ({str(error).splitlines()[0]})"
            raise OptionError("task.training_crop.size", found, "use another size") from None

    def _protocol(self) -> dict[str, Any]:
        task = self.task
        return {
            "task": "finetune",
            "frozen": self.start.describe(),
            "data": {"train": hash_of_images(self.images), "validation": hash_of_images(self.splits.validation)},
            "images": {"train": len(self.images), "validation": len(self.splits.validation)},
            "label_fraction": task.label_fraction,
            "seed": self.runtime.seed,
            "epochs": task.epochs,
            "max_steps": task.max_steps,
            "images_per_step": self.loader.images_per_step,
            "optimizer": {"kind": type(task.optimizer).__name__} | vars(task.optimizer),
            "warmup_epochs": task.warmup_epochs,
            "final_learning_rate": task.final_learning_rate,
            "weight_decay": task.weight_decay,
            "layer_decay": task.layer_decay,
            "label_smoothing": task.label_smoothing,
            "ema_momentum": task.ema_momentum,
            "training_crop": task.training_crop.describe(),
            "mixing": task.mixing.describe(),
        }

    def _announce(self, start: int) -> None:
        task, runtime = self.task, self.runtime
        peak = self.schedules.learning_rate
        lowest = f"{peak * min(self.rate_scales.values()):.3g} in the first layer" if task.layer_decay < 1 else "the same in all layers"
        for line in (
            f"run folder     {runtime.folder}",
            f"device         {runtime.device}, {runtime.world_size} process{'es' if runtime.world_size > 1 else ''}, {runtime.precision}, "
            f"{runtime.threads} CPU thread{'s' if runtime.threads > 1 else ''} each, "
            f"{'deterministic' if runtime.deterministic else 'not deterministic'}",
            f"begins with    {_beginning(self.protocol['frozen'], task.frozen.checkpoint)}",
            f"images         {len(self.images)} of {len(self.splits.class_names)} classes, {100 * task.label_fraction:g}% of the labels, "
            f"{self.loader.images_per_step} per step; {len(self.splits.validation)} to validate",
            f"steps          {self.stop}, {start} of them done before, {self.loader.steps_per_epoch} per epoch, {task.epochs} epochs",
            f"learning rate  {peak:.3g} at its peak (scaled to {self.loader.images_per_step} images per step), {lowest}",
        ):
            self.progress.say(line)
        if runtime.is_main:
            self.tracker.artifact(runtime.folder / "config.yaml")
            self.tracker.artifact(write_protocol(runtime.folder, self.protocol))

    def _finish(self) -> None:
        """The last network's file, curves, final metrics and a table (rank 0)."""
        if not self.runtime.is_main:
            return
        folder = self.runtime.folder
        records = self.tracker.records()
        write_classifier(folder / LAST, self._networks() | self._origin(self.stop))
        for name, panel in CURVES.items():
            drawn = curves_svg(panel, records)
            if drawn is not None:
                (folder / name).write_bytes(drawn)
                self.tracker.artifact(folder / name)
        metrics = self._final_metrics(records)
        self.tracker.final(metrics, self.stop)  # metrics.json, which makes the run a finished one
        for line in self._table(metrics):
            self.progress.say(line)

    def _final_metrics(self, records: list[dict]) -> dict[str, float]:
        """Of the last validation, and of the best. Fewer labels are another task, so the names of its metrics say so."""
        last = next(record for record in reversed(records) if "finetune/top1" in record)
        found = {name: value for name, value in last.items() if name.startswith("finetune/")}
        found |= {"finetune/best_top1": self.best["top1"], "finetune/best_epoch": self.best["epoch"]}
        fraction = self.task.label_fraction
        suffix = "" if fraction == 1 else f"_labels{fraction:g}"
        metrics = {f"{name}{suffix}": value for name, value in found.items()}
        return metrics | {
            EVALUATED_STEP: self.protocol["frozen"]["step"],
            "step": self.stop,
            "epoch": last["epoch"],
            "images_seen": self.stop * self.loader.images_per_step,
        }

    def _table(self, metrics: dict[str, float]) -> list[str]:
        """Lines for the console."""
        values = {name.partition("_labels")[0]: value for name, value in metrics.items()}
        rows = [("weights", f"{values['finetune/top1']:.2f} % top-1, {values['finetune/top5']:.2f} % top-5")]
        if "finetune/ema_top1" in values:
            rows.append(("moving average", f"{values['finetune/ema_top1']:.2f} % top-1, {values['finetune/ema_top5']:.2f} % top-5"))
        best = {"student": "the weights", "teacher": "the moving average"}[self.best["network"]]
        rows.append(("best", f"{self.best['top1']:.2f} % top-1 of {best} in epoch {self.best['epoch']}, chosen on the validation images"))
        rows += [("run folder", str(self.runtime.folder)), ("files", f"{LAST}, {BEST}")]
        width = max(len(label) for label, _ in rows)
        return ["", *(f"{label:<{width}}  {text}" for label, text in rows)]


def _with_fraction(splits: Splits, fraction: float, seed: int) -> Splits:
    """With `fraction` of the training images of each class."""
    if fraction == 1:
        return splits
    assert splits.train.labels is not None
    return replace(splits, train=Subset(splits.train, stratified_fraction(splits.train.labels, fraction, seed)))


def _schedules(task: FineTune, loader: TrainLoader) -> Schedules:
    """Of learning rate and weight decay; there is no teacher, whose values are left at rest."""
    return Schedules(
        epochs=task.epochs,
        steps_per_epoch=loader.steps_per_epoch,
        learning_rate=scaled_learning_rate(task.optimizer.learning_rate, loader.images_per_step),
        warmup_learning_rate=0.0,
        final_learning_rate=task.final_learning_rate,
        warmup_epochs=task.warmup_epochs,
        weight_decay_start=task.weight_decay,
        weight_decay_end=task.weight_decay,
        teacher_momentum_start=1.0,
        teacher_momentum_end=1.0,
        teacher_temperature_start=1.0,
        teacher_temperature_end=1.0,
        teacher_temperature_warmup_epochs=0,
        freeze_last_layer_epochs=0,
    )


def _as_metrics(accuracy: Accuracy, prefix: str) -> dict[str, float]:
    return {
        f"finetune/{prefix}top1": accuracy.top1,
        f"finetune/{prefix}top5": accuracy.top5,
        f"finetune/{prefix}loss": accuracy.loss,
    }


def _beginning(frozen: dict[str, Any], checkpoint: str | None) -> str:
    if frozen["network"] == "untrained":
        return "an untrained network"
    step = f", step {frozen['step']}" if frozen["step"] else ""
    return f"the {frozen['network']} of {checkpoint}{step}"


def _mean_over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """Each rank's meter knows its own batches only."""
    everyone = distributed.gather_objects(metrics)
    return {name: sum(each[name] for each in everyone) / len(everyone) for name in metrics}
