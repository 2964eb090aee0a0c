"""Pre-training by self-distillation with view- and region-level losses (EsViT, Li et al. 2022): the loop around `Distillation`.

Unusual: every random draw is keyed (views by epoch and position, the rest by step and rank), so that a resumed run repeats
bit for bit what it would have done; and the host waits for the device only where a log record is due.
"""

import contextlib
import copy
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from esvit import distributed
from esvit.augmentations import device
from esvit.augmentations.evaluation import Normalize
from esvit.augmentations.mixing import Mixing
from esvit.augmentations.multicrop import Augmentation
from esvit.backbones.base import Backbone
from esvit.checkpoint_writing import CheckpointWriter
from esvit.checkpoints import CheckpointFolder, has_checkpoint, peek, strict_load
from esvit.data.bad_images import BadImages
from esvit.data.base import Data, ImageSet
from esvit.data.loading import TrainLoader
from esvit.data.sampling import Sampler, Shuffle
from esvit.data.subsets import Subset
from esvit.errors import Interrupted, OptionError
from esvit.evaluation.figures import crops_grid
from esvit.evaluation.health import diagnose, health_signs
from esvit.losses.combined import ViewRegionLoss
from esvit.losses.view import ViewLoss
from esvit.networks import HeadOptions, MultiCropNetwork
from esvit.optimizers import LARS, SGD, AdamW
from esvit.published import load_networks, read_networks
from esvit.records import PrototypeWeights, Views
from esvit.run_folder import RunFolder, write_atomically
from esvit.runtime import Runtime, warn_of_thread_change
from esvit.schedules import Schedules, scaled_learning_rate
from esvit.state_files import save_atomically
from esvit.tasks import sharding
from esvit.tasks.distillation import Distillation, StepResult
from esvit.tasks.garbage import collected_together
from esvit.tasks.loader_health import LoaderHealth, cores_per_process
from esvit.tasks.meter import Meter
from esvit.tasks.nonfinite import NonFiniteLoss, save_bad_batch
from esvit.tasks.online_knn import LabelledSplit, OnlineKnn
from esvit.tasks.online_linear import TEACHER, OnlineLinear
from esvit.tasks.plan import plan_lines
from esvit.tasks.summary import final_metrics, table, write_run_report
from esvit.teacher import Teacher
from esvit.tracking.base import Tracker
from esvit.tracking.console import Progress
from esvit.tracking.system import SystemMonitor

BACKGROUND = "background"  # of checkpoint_writing
HEALTH_GRACE_STEPS = 300  # a fresh network maps all images to nearly one point, which is no alarm yet


@dataclass(kw_only=True)
class Pretrain:
    """The parts of a pre-training run; every field is an option or is built from a config group.

    accumulation        micro-batches per optimizer step
    parts               in which the student's crops of one size pass forward and backward, one after the other
    recompute           of the student's backbone: "mlp", "attention" or "blocks" are computed twice instead of kept, or "none"
    compile             let torch.compile make graphs of the blocks of both backbones
    sharding            "none", or "fsdp" or "hsdp": student and teacher in shares, see sharding.py
    shard_prototypes    each process keeps its share of the prototypes only
    log_every           optimizer steps between log records
    health_every        optimizer steps between signs of health; 0 means never
    checkpoint_every    optimizer steps between checkpoints, of which `checkpoint_keep` are kept
    checkpoint_writing  "now": training waits for the disk; "background": it goes on from a copy of the state
    checkpoint_shares   with `sharding`: each process writes its own shares into a folder; the last checkpoint is one file in any case
    keep_teacher_every  epochs between copies of the teacher's backbone that stay, in teachers/; 0 means never
    max_steps           stop after so many optimizer steps, with schedules of full length; None means at the end
    checkpoint          a file, ours or a published one, whose student, teacher and centres the run begins with, or None
    start_epoch         with `checkpoint`: the epoch at which schedules and data order begin
    fresh_heads         "none", "region" or "all": heads that begin anew instead, with their prototypes and centre
    resize_positions    resize tables of positions in `checkpoint` that were made for other windows or another image size
    """

    backbone: Backbone
    head: HeadOptions
    loss: ViewLoss | ViewRegionLoss
    augmentation: Augmentation
    mixing: Mixing
    normalize: Normalize
    data: Data
    sampler: Sampler
    optimizer: AdamW | SGD | LARS
    schedule: Callable[..., Schedules]
    online_knn: OnlineKnn
    online_linear: OnlineLinear
    epochs: int
    max_steps: int | None
    accumulation: int
    parts: int
    recompute: str
    compile: bool
    sharding: str
    shard_prototypes: bool
    log_every: int
    health_every: int
    checkpoint_every: int
    checkpoint_keep: int
    checkpoint_writing: str
    checkpoint_shares: bool
    keep_teacher_every: int
    checkpoint: str | None
    start_epoch: int
    fresh_heads: str
    resize_positions: bool

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
            ("task.accumulation", self.accumulation, 1),
            ("task.parts", self.parts, 1),
            ("task.log_every", self.log_every, 1),
            ("task.health_every", self.health_every, 0),
            ("task.checkpoint_keep", self.checkpoint_keep, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("evaluate_every", self.keep_teacher_every, 0),
            ("max_steps", 1 if self.max_steps is None else self.max_steps, 1),
            ("start_epoch", self.start_epoch, 0),
        ):
            if value < least:
                raise OptionError(option, f"{value} is too small", f"use {least} or more")
        if self.checkpoint_shares and self.sharding == sharding.NONE and not self.shard_prototypes:
            found = "needs student and teacher in shares, and task.sharding is none"
            raise OptionError(
                "task.checkpoint_shares", found, "use task.sharding=fsdp (or hsdp) or task.shard_prototypes=true, or leave it false"
            )
        if self.start_epoch >= self.epochs:
            found = f"{self.start_epoch} is not before the end of epochs={self.epochs}"
            raise OptionError("start_epoch", found, "use a smaller one, or more epochs")


class _Run:
    """One run of a `Pretrain`, with everything built."""

    def __init__(self, task: Pretrain, runtime: Runtime):
        self.task = task
        self.runtime = runtime
        self.images: ImageSet = task.data.train()
        self.accumulation = self._accumulation()
        self.loader = TrainLoader(
            images=self.images,
            transform=task.augmentation,
            batch_size=task.data.batch_size,
            workers=task.data.workers,
            seed=runtime.seed,
            rank=runtime.rank,
            world_size=runtime.world_size,
            accumulation=self.accumulation,
            max_bad_fraction=task.data.max_bad_fraction,
            sampler=task.sampler,
        )
        self.schedules = task.schedule(
            epochs=task.epochs,
            steps_per_epoch=self.loader.steps_per_epoch,
            learning_rate=scaled_learning_rate(task.optimizer.learning_rate, self.loader.images_per_step),
        )
        self.stop = min(self.schedules.total_steps, task.max_steps or self.schedules.total_steps)
        self.first_step = task.start_epoch * self.loader.steps_per_epoch
        if self.stop <= self.first_step:
            found = f"{self.stop}, but start_epoch={task.start_epoch} begins after {self.first_step}"
            raise OptionError("max_steps", found, "use a larger one")
        self.labelled: LabelledSplit | None = task.online_knn.open(task.data, self.images)
        self.probe = task.online_linear.open(
            self.images,
            dim=task.backbone.dim,
            images_per_step=self.loader.images_per_step,
            mixes_images=task.mixing.is_on,
            runtime=runtime,
        )
        self._check_crop_sizes()
        network = task.head.attach(task.backbone, regions=task.loss.needs_regions).to(runtime.device)
        if runtime.world_size > 1 and runtime.device.type == "cuda":
            network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        sharding.check(
            network=network,
            optimizer=task.optimizer,
            sharding=task.sharding,
            precision=runtime.precision,
            world_size=runtime.world_size,
        )
        if task.shard_prototypes:
            sharding.check_prototypes(
                prototypes=task.head.prototypes, optimizer=task.optimizer, precision=runtime.precision, world_size=runtime.world_size
            )
        task.loss.setup(prototypes=task.head.prototypes)
        task.loss.to(runtime.device)
        task.loss.choose_kernel(device=runtime.device, precision=runtime.precision, width=task.head.bottleneck_dim)
        teacher = Teacher(network)
        self.beginning = "" if has_checkpoint(runtime.folder) else self._begin(network, teacher.network)
        self.spare = copy.deepcopy(network).cpu() if sharding.is_on(task.sharding) else None
        sharding.shard(network, teacher, sharding=task.sharding, device=runtime.device)
        if task.shard_prototypes:
            sharding.shard_prototypes(network, teacher, device=runtime.device)
        self.distillation = Distillation(
            network=network,
            loss=task.loss,
            optimizer=task.optimizer.build(network, precision=runtime.precision, device=runtime.device),
            runtime=runtime,
            global_count=task.augmentation.global_count,
            accumulation=self.accumulation,
            parts=task.parts,
            mixing=task.mixing if task.mixing.is_on else None,
            teacher=teacher,
        )
        task.backbone.recompute(task.recompute)
        if task.compile:
            for each in (self.distillation.network, self.distillation.teacher.network):
                each.backbone.compile_blocks()
        self.meter = Meter(runtime.device)
        self.loader_health = LoaderHealth(
            workers=task.data.workers,
            cores=cores_per_process(),
            engine=task.augmentation.engine,
            on_gpu=runtime.device.type != "cpu",
            sampler=task.sampler.name,
            has_chunks=self.images.chunk_ends is not None,
        )
        self.notes: list[str] = []
        self.unreadable: list[str] = []  # names of images met here since the last record
        self.indices: list[Tensor] = []  # of the images of each micro-batch of the step

    def run(self, tracker: Tracker) -> None:
        folder = self.runtime.folder
        self.tracker = tracker
        self.checkpoints = CheckpointWriter(
            CheckpointFolder(folder, keep=self.task.checkpoint_keep), background=self.task.checkpoint_writing == BACKGROUND
        )
        self.bad_images = BadImages(
            folder=folder, image_count=len(self.images), max_bad_fraction=self.task.data.max_bad_fraction, writes=self.runtime.is_main
        )
        self.system = SystemMonitor(folder)
        start, record_is_due = self._resume()
        self.stop = max(self.stop, start)
        self.progress = Progress(total=self.stop, start=start, is_main=self.runtime.is_main)
        self._announce(start)
        if record_is_due:  # the last attempt was stopped before it could evaluate
            self._record(start, None)
        try:
            self._train(start)
        finally:
            self.progress.close()
        self._finish()

    def _train(self, start: int) -> None:
        with (
            contextlib.closing(self._on_device(self.loader.from_step(start))) as batches,  # closing ends the loading processes
            collected_together() as collect_garbage,
            self.checkpoints.writing(),
        ):
            self._train_on(batches, start, collect_garbage)

    def _train_on(self, batches: Iterator[list[Tensor]], start: int, collect_garbage: Callable[[int], None]) -> None:
        for step in range(start, self.stop):
            now = self.schedules.at(step)
            rng = self.runtime.seed_step(step)
            self.distillation.set_progress(step / self.schedules.total_steps)
            self.indices.clear()
            micro_batches = itertools.islice(batches, self.accumulation)
            result = self.distillation.step(micro_batches, now, sound=self.meter.finite, rng=rng)
            self.meter.add(result, step=step, images=self.loader.images_per_step)
            if self.probe is not None:
                self.meter.add_scalars(self.probe.step(result, self.indices, step=step, total_steps=self.schedules.total_steps))
            self.progress.advance()

            done = step + 1
            collect_garbage(done)
            self.runtime.beat(f"after step {done}")
            signal = self.runtime.stop_signal()
            record_is_due = self._is_record_due(done)
            if record_is_due and not signal:
                self._record(done, result)
            if self._is_teacher_due(done):
                self._keep_teacher(done)
            if signal or done % self.task.checkpoint_every == 0 or done == self.stop:
                self._save(done, record_is_due=record_is_due and bool(signal))
            if signal:
                self.checkpoints.wait()
                raise Interrupted(signal, done)

    def _on_device(self, batches: Iterator[Views]) -> Generator[list[Tensor]]:
        """Normalised crops of each micro-batch; the time spent waiting for the loader goes to the meter."""
        while True:
            since = time.perf_counter()
            views = next(batches)
            self.meter.waited(time.perf_counter() - since)
            self.unreadable += views.bad_images
            self.indices.append(views.indices)
            yield [self.task.normalize(crop) for crop in self._finished(views.to(self.runtime.device))]

    def _finished(self, views: Views) -> list[Tensor]:
        """The crops after what an engine may have left to the device."""
        return device.finish(views.crops, views.changes)

    # ------------------------------------------------------------------ records

    def _is_record_due(self, done: int) -> bool:
        return done % self.task.log_every == 0 or self._is_health_due(done) or self._is_knn_due(done) or done == self.stop

    def _is_health_due(self, done: int) -> bool:
        return self.task.health_every > 0 and done % self.task.health_every == 0

    def _is_knn_due(self, done: int) -> bool:
        if self.labelled is None:
            return False
        return done % (self.task.online_knn.every_epochs * self.loader.steps_per_epoch) == 0 or done == self.stop

    def _record(self, done: int, result: StepResult | None) -> None:
        """Read the meter, look at health and k-NN where they are due, and log one record for `done` completed steps."""
        now = self.schedules.at(done - 1)
        metrics = _mean_over_ranks(self.meter.read())
        self._stop_if_not_finite()
        self._count_bad_images()
        if result is not None and self._is_health_due(done):
            signs = self._health(result, now.temperature)
            metrics |= signs
            for alarm in self._alarms(signs, done):
                self.progress.say(f"ALARM  {alarm}")
                self.notes.append(alarm)
        if hint := self.loader_health.look(metrics.get("speed/data_wait_share")):
            self.progress.say(f"HINT   {hint}")
            self.notes.append(hint)
        if self._is_knn_due(done):
            metrics |= self._knn() | self._baselines()
        metrics |= {
            "schedule/learning_rate": now.learning_rate,
            "schedule/weight_decay": now.weight_decay,
            "schedule/momentum": now.momentum,
            "schedule/temperature": now.temperature,
            "memory/peak_gb": self.runtime.peak_memory_gb(),
            "data/bad_images": self.bad_images.count,
        }
        if self.runtime.is_main:
            metrics |= self.system.metrics()
        self.tracker.log(done, now.epoch, metrics)
        self.progress.show(done, now.epoch, metrics)
        self.meter.restart_clock()

    def _count_bad_images(self) -> None:
        """Every rank counts what all ranks met, so that all stop together when it is too much."""
        self.bad_images.add(itertools.chain.from_iterable(distributed.gather_objects(self.unreadable)))
        self.unreadable = []

    def _health(self, result: StepResult, temperature: float) -> dict[str, float]:
        signs = health_signs(
            student_outputs=result.student_outputs,
            teacher_outputs=result.teacher_outputs,
            student_prototypes=_whole(result.student_prototypes),
            teacher_prototypes=_whole(result.teacher_prototypes),
            center=self.task.loss.center,
            student_temperature=self.task.loss.student_temperature,
            teacher_temperature=temperature,
        )
        return {name: float(value) for name, value in signs.as_metrics().items()}

    def _alarms(self, signs: dict[str, float], done: int) -> list[str]:
        return diagnose(
            signs,
            step=done,
            grace_steps=HEALTH_GRACE_STEPS,
            prototypes=self.task.head.prototypes,
            rows=self.task.data.batch_size * self.task.augmentation.global_count,
        )

    def _knn(self) -> dict[str, float]:
        """And how well the linear classifier on the side, where there is one, does on the same validation images."""
        assert self.labelled is not None
        teacher, student = self.distillation.teacher.network, self.distillation.network
        train, validation = self._features(self.labelled.train, teacher), self._features(self.labelled.validation, teacher)
        top1, top5 = self.labelled.accuracy(train, validation)
        metrics = {"knn/teacher": top1, "knn/teacher_top5": top5}
        if self.probe is not None:
            features, places = validation if self.probe.network == TEACHER else self._features(self.labelled.validation, student)
            metrics |= self.probe.judge(features, torch.from_numpy(self.labelled.validation.labels)[places])
        return metrics

    def _features(self, images: Subset, network: MultiCropNetwork) -> tuple[Tensor, Tensor]:
        assert self.labelled is not None
        with self._whole(network) as whole:
            return self.labelled.features(images, whole, self.task.normalize, self.runtime)

    def _whole(self, network: MultiCropNetwork) -> contextlib.AbstractContextManager[MultiCropNetwork]:
        return sharding.whole(network, spare=self.spare, device=self.runtime.device)

    def _baselines(self) -> dict[str, float]:
        """What the teacher has to beat, as measured before the first step; nothing if that was not asked for."""
        return json.loads(self._baselines_file.read_text()) if self._baselines_file.exists() else {}

    @property
    def _baselines_file(self) -> Path:
        return self.runtime.folder / "baselines.json"

    def _measure_baselines(self) -> None:
        assert self.labelled is not None
        with self._whole(self.distillation.teacher.network) as teacher:
            untrained, _ = self.labelled.of_network(teacher, self.task.normalize, self.runtime)
        if self.runtime.is_main:
            measured = self.labelled.of_trivial_features() | {"knn/untrained": untrained}
            write_atomically(self._baselines_file, json.dumps(measured))
        distributed.barrier()

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
            "lower it, lengthen schedule.warmup_epochs, or use precision=bf16 or fp32; the last checkpoint is from before",
        )

    # ------------------------------------------------------------------ checkpoints

    def _is_teacher_due(self, done: int) -> bool:
        every = self.task.keep_teacher_every * self.loader.steps_per_epoch
        return every > 0 and done % every == 0

    def _keep_teacher(self, done: int) -> None:
        """The teacher's backbone alone, for evaluations while training goes on; never deleted."""
        backbone = distributed.gathered(self.distillation.teacher.network.backbone.state_dict(), everywhere=False)
        if self.runtime.is_main:
            state = {
                "teacher": {f"backbone.{name}": value for name, value in backbone.items()},
                "step": done,
                "epoch": done // self.loader.steps_per_epoch,
                "config": self.config,
            }
            save_atomically(state, self.runtime.folder / "teachers" / f"teacher_{done:07d}.pt")

    def _save(self, done: int, *, record_is_due: bool) -> None:
        """The checkpoint after `done` steps. Written now, it is on disk when this returns, on every rank."""
        self._stop_if_not_finite()
        rng = distributed.gather_objects(torch.get_rng_state())
        meters = distributed.gather_objects(self.meter.state_dict())
        state = self.distillation.state_dict()
        if self.runtime.is_main:
            self.tracker.sync_to_disk()
            epoch, step_of_epoch = divmod(done, self.loader.steps_per_epoch)
            state |= {
                "step": done,
                "record_is_due": record_is_due,
                "meters": meters,
                "online_linear": None if self.probe is None else self.probe.state_dict(),
                "sampler": {
                    "epoch": epoch,
                    "step_of_epoch": step_of_epoch,
                    "images_per_step": self.loader.images_per_step,
                    "images": len(self.images),
                    "order": self.task.sampler.name,
                },
                "rng": rng,
                "threads": self.runtime.threads,
                "config": self.config,
                "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
            }
        has_shares = any(distributed.is_sharded(parameter) for parameter in self.distillation.network.parameters())
        in_shares = self.task.checkpoint_shares and has_shares and done != self.stop  # a finished run has a checkpoint.pt
        self.checkpoints.save(state, done, in_shares=in_shares)
        self.meter.restart_clock()

    @cached_property
    def config(self) -> dict:
        return RunFolder(self.runtime.folder).config()

    def _resume(self) -> tuple[int, bool]:
        """Completed steps, and whether their record is still due; everything is as it was after them."""
        state = self.checkpoints.folder.load()
        if state is None:
            self.tracker.resume(self.first_step)
            return self.first_step, False
        if state["sampler"]["images"] != len(self.images):
            raise OptionError(
                "data.root", f"has {len(self.images)} images, the run so far had {state['sampler']['images']}", "give the same images"
            )
        before, now = state["sampler"].get("order", Shuffle.name), self.task.sampler.name
        if before != now:
            raise OptionError("sampler", f"is {now}, the run so far had {before}", f"use sampler={before}, or another output_dir")
        warn_of_thread_change(state["threads"], self.runtime.threads)
        distillation = self.distillation
        strict_load(distillation.network, state["student"], option="output_dir", what="student")
        strict_load(distillation.teacher.network, state["teacher"], option="output_dir", what="teacher")
        strict_load(distillation.loss, state["loss"], option="output_dir", what="loss")
        distillation.optimizer.load_state_dict(state["optimizer"])
        if self.probe is not None:
            self.probe.load_state_dict(state["online_linear"])
        if self.runtime.rank < len(state["rng"]):
            torch.set_rng_state(state["rng"][self.runtime.rank])
            self.meter.load_state_dict(state["meters"][self.runtime.rank])
        self.tracker.resume(state["step"])
        return state["step"], state["record_is_due"]

    def _accumulation(self) -> int:
        """Micro-batches per step: as many as make the steps of the run so far, on however many processes it goes on.

        Raises OptionError if no number does.
        """
        saved = peek(self.runtime.folder)
        if saved is None:
            return self.task.accumulation
        images, batch_size, processes = saved["sampler"]["images_per_step"], self.task.data.batch_size, self.runtime.world_size
        if images % (batch_size * processes):
            raise OptionError(
                "launcher.processes",
                f"{processes} processes of data.batch_size={batch_size} cannot make the steps of {images} images that the run so far had",
                f"use a number of processes that divides {images // batch_size}",
            )
        return images // (batch_size * processes)

    def _begin(self, student: MultiCropNetwork, teacher: MultiCropNetwork) -> str:
        """Give a new run the weights of `checkpoint`, where one is asked for; returns in words what it begins with.

        The optimizer's state is left behind: its moments belong to another schedule, or to other parameters.
        """
        task = self.task
        if task.checkpoint is None:
            for option, is_default in (("start_epoch", task.start_epoch == 0), ("fresh_heads", task.fresh_heads == "none")):
                if not is_default:
                    raise OptionError("checkpoint", f"is not set, but {option} goes on from one", "give the checkpoint file to begin with")
            return ""
        saved = read_networks(task.checkpoint)
        load_networks(
            saved,
            student=student,
            teacher=teacher,
            loss=task.loss,
            fresh_heads=task.fresh_heads,
            resize_positions=task.resize_positions,
        )
        age = "" if saved.epoch is None else f", after {saved.epoch} epochs"
        fresh = {"none": "", "region": "; the region head is fresh", "all": "; all heads are fresh"}[task.fresh_heads]
        return f"{task.checkpoint} (of {saved.origin}{age}){fresh}"

    # ------------------------------------------------------------------ before and after

    def _check_crop_sizes(self) -> None:
        """Send one empty image of each size through the backbone, so that impossible sizes fail before any work."""
        backbone, channels = self.task.backbone, self.images.pixels.channels
        self.task.normalize.check_channels(channels)
        for size in sorted(set(self.task.augmentation.crop_sizes)):
            try:
                with torch.no_grad():
                    backbone.eval()(torch.zeros(1, channels, size, size))
            except RuntimeError as error:
                if "channels" in str(error):
                    found = f"does not fit images of data.channels={channels} ({str(error).splitlines()[0]})"
                    raise OptionError("backbone.in_channels", found, f"use backbone.in_channels={channels}") from None
                raise OptionError(
                    self.task.augmentation.option_of(size),
                    f"the backbone cannot take crops of {size} pixels ({str(error).splitlines()[0]})",
                    "use larger crops",
                ) from None
        backbone.train()

    def _announce(self, start: int) -> None:
        network = self.distillation.network
        for line in plan_lines(
            network=network,
            backbone=network.backbone,
            runtime=self.runtime,
            schedules=self.schedules,
            images=len(self.images),
            images_per_step=self.loader.images_per_step,
            batch_size=self.task.data.batch_size,
            accumulation=self.accumulation,
            prototypes=self.task.head.prototypes,
            prototype_matrices=2 if self.task.loss.needs_regions else 1,
            prototype_shares=self.runtime.world_size if self.task.shard_prototypes else 1,
            bottleneck_dim=self.task.head.bottleneck_dim,
            start=start,
            stop=self.stop,
            checkpoint_every=self.task.checkpoint_every,
        ):
            self.progress.say(line)
        if self.task.loss.is_fused:
            self.progress.say("loss           fused kernels")
        if self.beginning:
            self.progress.say(f"begins with    {self.beginning}")
            self.progress.say(f"               at epoch {self.task.start_epoch} of the schedules, with a fresh optimizer")
        if start == self.first_step and self.labelled is not None and self.task.online_knn.baselines and not self._baselines_file.exists():
            self._measure_baselines()
        if self.runtime.is_main:
            self.tracker.artifact(self.runtime.folder / "config.yaml")
            if not self._crops_file.exists():
                sheet = self.loader.redraw(0, range(min(8, len(self.images))))
                self._crops_file.write_bytes(crops_grid(self._finished(sheet)))
            self.tracker.artifact(self._crops_file)

    @property
    def _crops_file(self) -> Path:
        return self.runtime.folder / "crops.png"

    def _finish(self) -> None:
        """Final metrics, report and table (rank 0)."""
        if not self.runtime.is_main:
            return
        records = self.tracker.records()
        metrics = final_metrics(records, step=self.stop, images_per_step=self.loader.images_per_step)
        metrics["images_seen"] = (self.stop - self.first_step) * self.loader.images_per_step
        report = write_run_report(
            self.runtime.folder, records=records, metrics=metrics, config=self.config, crops=self._crops_file, notes=self.notes
        )
        self.tracker.artifact(report)
        self.tracker.final(metrics, self.stop)  # metrics.json, which makes the run a finished one
        for line in table(metrics, folder=self.runtime.folder, report=report, view_command=self.tracker.view_command):
            self.progress.say(line)


def _whole(prototypes: PrototypeWeights) -> PrototypeWeights:
    """Those of views, whole on every rank even where each has a share; those of regions are left out."""
    return PrototypeWeights(view=distributed.whole(prototypes.view), region=None)


def _mean_over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """Each rank's meter knows its own batches only."""
    everyone = distributed.gather_objects(metrics)
    return {name: sum(each[name] for each in everyone) / len(everyone) for name in metrics}
