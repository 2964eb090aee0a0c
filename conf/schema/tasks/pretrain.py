"""Options of pre-training."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.schema.augmentations import Mixing, Normalize


@dataclass
class OnlineKnn:
    _target_: str = "esvit.tasks.pretrain.OnlineKnn"
    every_epochs: int = 0  # epochs between k-NN evaluations of the teacher; 0 means never
    neighbours: int = 20  # k
    temperature: float = 0.07  # of the neighbours' votes
    resize: int = 256  # short side that images are resized to (pixels)
    crop: int = 224  # side of the centre crop (pixels)
    max_train_images: int = 50000  # at most so many labelled training images, evenly spaced, are neighbours
    baselines: bool = False  # also, once, k-NN on raw pixels, on colour histograms and on the untrained network


class Sharding(Enum):
    none = "none"
    fsdp = "fsdp"
    hsdp = "hsdp"


class Writing(Enum):
    now = "now"
    background = "background"


class OnlineNetwork(Enum):
    none = "none"
    teacher = "teacher"
    student = "student"


@dataclass
class OnlineLinear:
    _target_: str = "esvit.tasks.pretrain.OnlineLinear"
    network: OnlineNetwork = OnlineNetwork.none  # teacher or student: a linear classifier learns from its features, on the side; none: no
    learning_rate: float = 0.1  # of that classifier at the first step, for 256 images a step; falls to 0 over the training


class Recompute(Enum):
    none = "none"
    mlp = "mlp"
    attention = "attention"
    blocks = "blocks"


@dataclass
class Pretrain:
    _target_: str = "esvit.tasks.pretrain.Pretrain"
    has_run_folder: bool = True
    accumulation: int = 1  # micro-batches per optimizer step
    parts: int = 2  # in which the student's crops of one size pass forward and backward in turn: more need less memory; no batch norm
    recompute: Recompute = (
        Recompute.none
    )  # the student's mlp, attention or blocks are computed twice, to keep less memory; none: all is kept
    compile: bool = False  # torch.compile for the blocks of both backbones: minutes at the start, faster steps on a GPU
    sharding: Sharding = Sharding.none  # fsdp: each process keeps a share of weights, moments and teacher; hsdp: of one machine; AdamW
    shard_prototypes: bool = False  # each process keeps its share of the prototypes only: from 131,072 of them on; AdamW, no fp16
    log_every: int = 10  # optimizer steps between log records (the only times the host waits for the device)
    health_every: int = 100  # optimizer steps between label-free signs of health; 0 means never
    checkpoint_keep: int = 2  # how many checkpoint_<step>.pt to keep
    checkpoint_writing: Writing = Writing.now  # now: training waits for the disk; background: goes on, from a copy in the CPU's memory
    checkpoint_shares: bool = False  # with sharding: each process writes its own shares, into folders checkpoint_<step>; the last is a file
    online_knn: OnlineKnn = field(default_factory=OnlineKnn)
    online_linear: OnlineLinear = field(default_factory=OnlineLinear)
    mixing: Mixing = field(default_factory=Mixing)
    normalize: Normalize = field(default_factory=Normalize)
    backbone: Any = "${backbone}"
    head: Any = "${head}"
    loss: Any = "${loss}"
    augmentation: Any = "${augmentation}"
    data: Any = "${data}"
    sampler: Any = "${sampler}"
    optimizer: Any = "${optimizer}"
    schedule: Any = "${schedule}"
    epochs: int = "${epochs}"  # type: ignore[assignment]
    max_steps: int | None = "${max_steps}"  # type: ignore[assignment]
    keep_teacher_every: int = "${evaluate_every}"  # type: ignore[assignment]
    checkpoint_every: int = "${checkpoint_every}"  # type: ignore[assignment]
    checkpoint: str | None = "${checkpoint}"
    start_epoch: int = "${start_epoch}"  # type: ignore[assignment]
    fresh_heads: Any = "${fresh_heads}"
    resize_positions: bool = "${resize_positions}"  # type: ignore[assignment]


SCHEMAS = {
    ("task", "pretrain"): Pretrain,
}
