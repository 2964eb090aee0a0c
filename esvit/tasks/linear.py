"""`task=linear`: linear classifiers on the features of a frozen backbone, judged on labelled validation images.

One learning rate, one number of blocks and one pooling are the published protocol as it is. Several are a sweep in one pass over the
features: the probe that is best on a held-out part of the training images, after the last epoch, is the one that meets the validation
images, once.

Unusual: a killed run goes on from the last epoch's end, one stopped by a signal from the very step, and both end bit for bit as if
nothing had happened.

Letters: P probes.
"""

import contextlib
import csv
import io
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esvit import distributed
from esvit.augmentations.supervised import RandomResizedCropFlip
from esvit.checkpoints import CheckpointFolder
from esvit.data.bad_images import BadImages
from esvit.data.base import Data, ImageSet
from esvit.data.subsets import Subset, held_out, stratified_fraction
from esvit.errors import Interrupted, OptionError, Stopped
from esvit.evaluation.feature_files import FeatureSet
from esvit.evaluation.frozen import Frozen, FrozenBackbone, hash_of_images
from esvit.evaluation.linear import (
    MOMENTUM,
    POOLINGS,
    WITH_REGIONS,
    Accuracy,
    AugmentedRows,
    CachedRows,
    Choice,
    LabelledRows,
    Probes,
    RowLayout,
    best_of,
    cached_steps,
    cosine_share,
)
from esvit.evaluation.protocol import write_protocol
from esvit.evaluation.splits import Splits, labelled_splits
from esvit.run_folder import write_atomically
from esvit.runtime import Runtime, warn_of_thread_change
from esvit.tasks.tables import aligned
from esvit.tracking.base import EVALUATED_STEP, Tracker
from esvit.tracking.console import Progress

AUGMENTED, CACHED = "augmented", "cached"
_SECONDS_BETWEEN_LINES = 10.0  # cached epochs take no time, and a line each would be no news
_SHOWN_PROBES = 5


@dataclass(kw_only=True)
class Linear:
    """One evaluation; the probes are all combinations of `learning_rates`, `blocks` and `pooling`.

    features        "augmented": every epoch sends new random crops through the backbone; "cached": the evaluation's crops, once
    learning_rates  at the first epoch, for 256 images a step
    blocks          how many of the last blocks a probe reads
    pooling         "pooled", or "pooled_and_regions" with the mean of the last stage's regions besides
    held_out        share of each class's training images that the best of several probes is chosen by; of one probe nothing is held out
    label_fraction  share of each class's training images that are used at all
    training_crop   with augmented features: the random crop
    epochs          passes over the training images
    """

    features: str
    learning_rates: list[float]
    blocks: list[int]
    pooling: list[str]
    held_out: float
    label_fraction: float
    training_crop: RandomResizedCropFlip
    frozen: Frozen
    data: Data
    epochs: int

    def run(self, runtime: Runtime) -> None:
        """Train the probes, judge the best, write `metrics.json`, `probes.csv`, `classifier.pt` and the protocol.

        Raises OptionError before any work for options that cannot work, Interrupted after a signal (state saved).
        """
        self._check()
        splits = labelled_splits(self.data)
        frozen = self.frozen.load(runtime, channels=self.data.channels)
        self._check_network(frozen)
        run = _Run(self, runtime, splits, frozen)
        with runtime.recording() as tracker:
            run.run(tracker)

    @property
    def choices(self) -> list[Choice]:
        """Rising learning rates first, then blocks, then poolings."""
        combinations = itertools.product(self.pooling, sorted(self.blocks), sorted(self.learning_rates))
        return [Choice(learning_rate=rate, blocks=blocks, pooling=pooling) for pooling, blocks, rate in combinations]

    def _check(self) -> None:
        grid: dict[str, list[Any]] = {"learning_rates": self.learning_rates, "blocks": self.blocks, "pooling": self.pooling}
        examples = {"learning_rates": "[0.001,0.01,0.1]", "blocks": "[1,4]", "pooling": "[pooled]"}
        for option, values in grid.items():
            if not values or len(set(values)) < len(values):
                found = "the list is empty" if not values else f"{values} names a value twice"
                raise OptionError(f"task.{option}", found, f"give one value or several, task.{option}={examples[option]} for example")
        if min(self.learning_rates) <= 0:
            raise OptionError("task.learning_rates", f"{min(self.learning_rates):g} is not above 0", "use 0.01 for example")
        if min(self.blocks) < 1:
            raise OptionError("task.blocks", f"{min(self.blocks)} blocks have no features", "use 1 or more")
        for pooling in self.pooling:
            if pooling not in POOLINGS:
                raise OptionError("task.pooling", f"'{pooling}' is no pooling", f"use {' or '.join(POOLINGS)}")
        if self.features not in (AUGMENTED, CACHED):
            raise OptionError("task.features", f"'{self.features}'", f"use {AUGMENTED} or {CACHED}")
        if self.epochs < 1:
            raise OptionError("epochs", f"{self.epochs} epochs", "train for at least 1")
        if not 0 < self.label_fraction <= 1:
            raise OptionError("task.label_fraction", f"{self.label_fraction:g} is no share", "use a number above 0, up to 1 (all labels)")
        if not 0 <= self.held_out < 1:
            raise OptionError("task.held_out", f"{self.held_out:g} is no share to hold out", "use a number from 0 to below 1")
        if self.held_out == 0 and len(self.choices) > 1:
            found = f"0, but the best of {len(self.choices)} probes must be chosen by images that none was trained on"
            raise OptionError("task.held_out", found, "use 0.1, or give one learning rate, one number of blocks and one pooling")

    def _check_network(self, frozen: FrozenBackbone) -> None:
        backbone = frozen.backbone
        count = len(backbone.block_dims)
        if max(self.blocks) > count:
            raise OptionError("task.blocks", f"the last {max(self.blocks)} of {count} blocks", f"use at most {count}")
        if WITH_REGIONS not in self.pooling:
            return
        side, channels = self.frozen.crop, len(self.frozen.normalize.mean)
        noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            blocks, regions = backbone.last_blocks_and_regions(noise.to(frozen.runtime.device), 1)
        if regions.shape == blocks[-1].shape and torch.allclose(blocks[-1], regions, rtol=1e-3, atol=1e-4):
            found = f"{WITH_REGIONS} adds the mean of the regions, which is what this backbone's pooled feature is already"
            raise OptionError("task.pooling", found, "use task.pooling=[pooled]")


class _Run:
    """One run of a `Linear`, with everything built that needs no features."""

    def __init__(self, task: Linear, runtime: Runtime, splits: Splits, frozen: FrozenBackbone):
        self.task = task
        self.runtime = runtime
        self.splits = splits
        self.frozen = frozen
        self.choices = task.choices
        self.layout = RowLayout.of(frozen.backbone, self.choices)
        assert splits.train.labels is not None
        used = stratified_fraction(splits.train.labels, task.label_fraction, runtime.seed)
        self.labelled = Subset(splits.train, used)
        assert self.labelled.labels is not None
        self.kept, self.out = held_out(self.labelled.labels, task.held_out if len(self.choices) > 1 else 0.0, runtime.seed)
        if len(self.choices) > 1 and len(self.out) == 0:
            found = "every class has one labelled image, so none can be held out"
            raise OptionError("task.held_out", found, "give one learning rate, one number of blocks and one pooling, or more labels")
        self.augmented: AugmentedRows | None = None
        if task.features == AUGMENTED:
            self.augmented = AugmentedRows(
                images=Subset(self.labelled, self.kept),
                crop=task.training_crop,
                frozen=frozen,
                layout=self.layout,
                data=task.data,
                runtime=runtime,
            )
        else:
            cached_steps(len(self.kept), batch_size=task.data.batch_size, world_size=runtime.world_size)

    def run(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.checkpoints = CheckpointFolder(self.runtime.folder, keep=1)
        self.bad_images = BadImages(
            folder=self.runtime.folder,
            image_count=len(self.labelled),
            max_bad_fraction=self.task.data.max_bad_fraction,
            writes=self.runtime.is_main,
        )
        self._announce()
        self.batches, self.judges = self._rows()
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = self.task.epochs * self.steps_per_epoch
        self.probes = Probes(
            choices=self.choices,
            layout=self.layout,
            classes=len(self.splits.class_names),
            images_per_step=self.batches.images_per_step,
            seed=self.runtime.seed,
            device=self.runtime.device,
        )
        self.losses = torch.zeros(len(self.choices), dtype=torch.float64, device=self.runtime.device)  # sums over the epoch so far
        start = self._resume()
        self._say(
            f"training       {self.task.epochs} epochs of {self.steps_per_epoch} steps of {self.batches.images_per_step} images"
            + (f", from step {start} on" if start else "")
        )
        self.progress = Progress(total=self.total_steps, start=start, is_main=self.runtime.is_main)
        self._since, self._steps_since, self._shown_at = time.monotonic(), 0, 0.0
        try:
            self._train(start)
            self._finish()
        finally:
            self.progress.close()

    def _rows(self) -> tuple[AugmentedRows | CachedRows, LabelledRows | None]:
        """What the probes are trained on, and the held-out rows that they are compared by, or None."""
        if self.augmented is not None:
            judges = _all_rows(self._features(Subset(self.labelled, self.out))) if len(self.out) else None
            return self.augmented, judges
        rows = self._features(self.labelled)
        train = CachedRows(images=_rows_at(rows, self.kept), batch_size=self.task.data.batch_size, runtime=self.runtime)
        return train, _rows_at(rows, self.out) if len(self.out) else None

    def _features(self, images: ImageSet) -> FeatureSet:
        return self.frozen.features(
            images, batch_size=self.task.data.batch_size, workers=self.task.data.workers, describe=self.layout.describe()
        )

    # ------------------------------------------------------------------ training

    def _train(self, start: int) -> None:
        with contextlib.closing(self.batches.from_step(start)) as batches:  # closing ends the loading processes
            for step in range(start, self.total_steps):
                rows, labels = next(batches)
                share = cosine_share(step // self.steps_per_epoch, self.task.epochs)
                self.losses += self.probes.step(rows, labels, rate_share=share)
                self._steps_since += 1
                self.progress.advance()

                done = step + 1
                self.runtime.beat(f"after step {done}")
                signal = self.runtime.stop_signal()
                epoch_is_over = done % self.steps_per_epoch == 0
                if epoch_is_over:
                    self._record(done)
                if epoch_is_over or signal:
                    self._save(done)
                if signal:
                    raise Interrupted(signal, done)

    def _record(self, done: int) -> None:
        """One log record for the epoch that `done` steps complete."""
        losses = (distributed.mean(self.losses) / self.steps_per_epoch).tolist()
        self.losses.zero_()
        if not np.isfinite(losses).any():
            found = f"no probe has a finite loss after {done} of {self.total_steps} steps"
            raise OptionError("task.learning_rates", found, "use smaller ones")
        self._count_bad_images()
        names = [choice.name for choice in self.choices]
        metrics = {f"linear_train_loss/{name}": loss for name, loss in zip(names, losses, strict=True)}
        best = 0
        if self.judges is not None:
            accuracies = self._held_out_accuracies()
            best = best_of(accuracies)
            metrics |= {f"linear_held_out_top1/{name}": each.top1 for name, each in zip(names, accuracies, strict=True)}
            metrics["linear/held_out_top1"] = accuracies[best].top1
        metrics["linear/train_loss"] = losses[best]
        epoch = done // self.steps_per_epoch - 1
        metrics["schedule/learning_rate_share"] = cosine_share(epoch, self.task.epochs)
        metrics["speed/images_per_second"] = self._steps_since * self.batches.images_per_step / (time.monotonic() - self._since)
        metrics["data/bad_images"] = self.bad_images.count
        self.tracker.log(done, epoch, metrics)
        if done == self.total_steps or time.monotonic() - self._shown_at > _SECONDS_BETWEEN_LINES:
            self.progress.show(done, epoch, metrics)
            self._shown_at = time.monotonic()
        self._since, self._steps_since = time.monotonic(), 0

    def _held_out_accuracies(self) -> list[Accuracy]:
        assert self.judges is not None
        return self.probes.accuracies(self.judges, range(len(self.choices)))

    def _count_bad_images(self) -> None:
        self.bad_images.add(itertools.chain.from_iterable(distributed.gather_objects(self.batches.bad_images)))
        self.batches.bad_images = []

    # ------------------------------------------------------------------ checkpoints

    def _save(self, done: int) -> None:
        losses = distributed.gather_objects(self.losses.cpu())
        if self.runtime.is_main:
            self.tracker.sync_to_disk()
            state = {
                "step": done,
                "probes": self.probes.state_dict(),
                "losses": losses,
                "images_per_step": self.batches.images_per_step,
                "steps_per_epoch": self.steps_per_epoch,
                "threads": self.runtime.threads,
            }
            self.checkpoints.save(state, done)
        distributed.barrier()

    def _resume(self) -> int:
        """Completed steps; the probes are as they were after them."""
        state = self.checkpoints.load()
        if state is None:
            self.tracker.resume(0)
            return 0
        if state["images_per_step"] != self.batches.images_per_step:
            raise OptionError(
                "launcher.processes",
                f"a step now has {self.batches.images_per_step} images, the run so far had {state['images_per_step']}",
                "use as many processes as before",
            )
        if state["steps_per_epoch"] != self.steps_per_epoch:
            found = f"an epoch now has {self.steps_per_epoch} steps, in the run so far it had {state['steps_per_epoch']}"
            raise OptionError("data.root", found, "give the same images")
        warn_of_thread_change(state["threads"], self.runtime.threads)
        self.probes.load_state_dict(state["probes"])
        self.losses.copy_(state["losses"][self.runtime.rank])
        self.tracker.resume(state["step"])
        return state["step"]

    # ------------------------------------------------------------------ before and after

    def _announce(self) -> None:
        """Before the first pass over the images, which may take its time."""
        task = self.task
        judged = f", {len(self.out)} held out to choose by" if len(self.out) else ""
        probes = f"{len(self.choices)} probes side by side: " if len(self.choices) > 1 else "one probe: "
        for line in (
            f"features       {task.features}, {self.layout.width} numbers of an image; {self.frozen.options.network} {self.frozen.weights}",
            f"probes         {probes}learning rates {_listed(task.learning_rates)}; blocks {_listed(task.blocks)}; {_listed(task.pooling)}",
            f"images         {len(self.kept)} to train on{judged}; {len(self.splits.validation)} to be judged by; "
            f"{len(self.splits.class_names)} classes",
        ):
            self._say(line)

    def _say(self, line: str) -> None:
        if self.runtime.is_main:
            print(line, flush=True)

    def _finish(self) -> None:
        """The chosen probe meets the validation images; results, files and table."""
        try:
            validation = self._features(self.splits.validation)
        except Stopped as stopped:
            raise Interrupted(stopped.signal_number, self.total_steps) from None
        judged = None if self.judges is None else self._held_out_accuracies()
        chosen = 0 if judged is None else best_of(judged)
        (result,) = self.probes.accuracies(_all_rows(validation), [chosen])
        if not self.runtime.is_main:
            return
        losses = [self.tracker.records()[-1][f"linear_train_loss/{choice.name}"] for choice in self.choices]
        choice = self.choices[chosen]
        metrics: dict[str, float] = {
            "linear/top1": result.top1,
            "linear/top5": result.top5,
            "linear/train_loss": losses[chosen],
            "linear/learning_rate": choice.learning_rate,
            "linear/blocks": choice.blocks,
            "linear/with_regions": float(choice.pooling == WITH_REGIONS),
            "linear/train_images": self.batches.image_count,
            "linear/validation_images": len(validation.places),
        }
        if judged is not None:
            metrics |= {"linear/held_out_top1": judged[chosen].top1, "linear/held_out_images": len(self.out)}
        for path in (
            self.runtime.folder / "config.yaml",
            self._write_probes(losses, judged, chosen),
            self._write_classifier(chosen),
            write_protocol(self.runtime.folder, self._protocol(validation, choice)),
        ):
            self.tracker.artifact(path)
        self.tracker.final(metrics | {EVALUATED_STEP: self.frozen.step, "step": self.total_steps}, self.total_steps)
        for line in self._table(result, losses, judged, chosen, len(validation.places)):
            self.progress.say(line)

    def _protocol(self, validation: FeatureSet, choice: Choice) -> dict[str, Any]:
        """All that the result depends on; `chosen` is a result itself."""
        task = self.task
        return {
            "task": "linear",
            "features": task.features,
            "training_crop": task.training_crop.describe() if task.features == AUGMENTED else None,
            "epochs": task.epochs,
            "images_per_step": self.batches.images_per_step,
            "momentum": MOMENTUM,
            "learning_rates": sorted(task.learning_rates),
            "blocks": sorted(task.blocks),
            "pooling": sorted(task.pooling),
            "held_out": task.held_out if len(self.choices) > 1 else 0.0,
            "label_fraction": task.label_fraction,
            "seed": self.runtime.seed,
            "chosen": {"learning_rate": choice.learning_rate, "blocks": choice.blocks, "pooling": choice.pooling},
            "frozen": self.frozen.describe(),
            "data": {"train": hash_of_images(self.labelled), "validation": validation.data},
            "images": {"train": self.batches.image_count, "held_out": len(self.out), "validation": len(validation.places)},
        }

    def _write_probes(self, losses: list[float], judged: list[Accuracy] | None, chosen: int) -> Path:
        """`probes.csv`: every probe, with its numbers on training and held-out images; the validation images were the chosen one's only."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["learning_rate", "blocks", "pooling", "train_loss", "held_out_top1", "held_out_top5", "chosen"])
        for number, choice in enumerate(self.choices):
            on_held_out = ["", ""] if judged is None else [f"{judged[number].top1:.3f}", f"{judged[number].top5:.3f}"]
            is_chosen = int(number == chosen)
            row = [f"{choice.learning_rate:g}", choice.blocks, choice.pooling, f"{losses[number]:.6g}", *on_held_out, is_chosen]
            table.writerow(row)
        path = self.runtime.folder / "probes.csv"
        write_atomically(path, text.getvalue())
        return path

    def _write_classifier(self, chosen: int) -> Path:
        """`classifier.pt`: the chosen linear layer, and what it is to be fed with."""
        choice = self.choices[chosen]
        content = {
            **{name: value.cpu() for name, value in self.probes.linears[chosen].state_dict().items()},
            "blocks": choice.blocks,
            "pooling": choice.pooling,
            "class_names": self.splits.class_names,
            "backbone": self.frozen.weights,
        }
        path = self.runtime.folder / "classifier.pt"
        temporary = path.with_name(f".{path.name}.tmp")
        torch.save(content, temporary)
        os.replace(temporary, path)
        return path

    def _table(self, result: Accuracy, losses: list[float], judged: list[Accuracy] | None, chosen: int, images: int) -> list[str]:
        choice = self.choices[chosen]
        lines = [f"linear         top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, of {images} validation images"]
        if judged is None:
            return lines
        depth = "the last block" if choice.blocks == 1 else f"the last {choice.blocks} blocks"
        lines.append(
            f"chosen         learning rate {choice.learning_rate:g}, {depth}, {choice.pooling}: "
            f"best of {len(judged)} on {len(self.out)} held-out images"
        )
        order = sorted(range(len(judged)), key=lambda number: -judged[number].top1)[:_SHOWN_PROBES]
        header = ["", "learning rate", "blocks", "pooling", "train loss", "held-out top-1"]
        cells = [
            ["", f"{one.learning_rate:g}", str(one.blocks), one.pooling, f"{losses[number]:.4f}", f"{judged[number].top1:.2f}"]
            for number, one in ((number, self.choices[number]) for number in order)
        ]
        lines += [f"  {line}" for line in aligned([header, *cells])]
        rates = sorted(self.task.learning_rates)
        if len(rates) > 1 and choice.learning_rate in (rates[0], rates[-1]):
            edge = "smallest" if choice.learning_rate == rates[0] else "largest"
            lines.append(
                f"note           the {edge} learning rate won: a {'smaller' if edge == 'smallest' else 'larger'} one may be better"
            )
        one = f"learning_rates=[{choice.learning_rate:g}] blocks=[{choice.blocks}] pooling=[{choice.pooling}]"
        lines.append(f"on all images  the chosen probe with nothing held out, in a new run: {one}")
        return lines


def _all_rows(features: FeatureSet) -> LabelledRows:
    assert features.labels is not None
    return LabelledRows(features=features.features, labels=features.labels, numbers=np.arange(len(features.labels)))


def _rows_at(features: FeatureSet, places: np.ndarray) -> LabelledRows:
    """The rows of the images at `places`; an image that could not be read has none."""
    assert features.labels is not None
    numbers = np.flatnonzero(np.isin(features.places.numpy(), places))
    return LabelledRows(features=features.features, labels=features.labels, numbers=numbers)


def _listed(values: list[Any]) -> str:
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
