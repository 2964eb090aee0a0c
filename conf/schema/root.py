"""The options of every task, and the groups."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from conf.schema.sweeps import Planning, Search


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class FreshHeads(Enum):
    none = "none"
    region = "region"
    all = "all"


@dataclass
class Root:
    """Top level. Groups first; each is chosen by name, e.g. `backbone=swin_small`."""

    task: Any = MISSING
    backbone: Any = MISSING
    head: Any = MISSING
    loss: Any = MISSING
    augmentation: Any = MISSING
    data: Any = MISSING
    sampler: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    tracking: Any = MISSING
    launcher: Any = MISSING
    runtime: Any = MISSING
    name: str = "${hydra:runtime.choices.backbone}"  # name of the run, part of its folder's name
    output_dir: str = "outputs/${hydra:runtime.choices.task}/${now:%Y-%m-%d_%H-%M-%S}_${name}"  # the run's folder; the same again resumes
    device: Device = Device.auto  # auto, cpu, cuda or mps; auto means cuda where there is one, else cpu
    precision: Precision = Precision.fp32  # of matrix products: fp32, bf16 or fp16 (fp16 scales the loss)
    seed: int = 0  # of weights, data order, crops and drop path
    epochs: int = 100  # passes over the images
    max_steps: int | None = None  # stop early after this many optimizer steps in all; the schedules keep their length
    checkpoint_every: int = 1000  # optimizer steps between checkpoints
    checkpoint: str | None = None  # a checkpoint file to start from, ours or a published one; the run's own checkpoint comes first
    of: str | None = None  # evaluations: folder of the run that gives backbone, images and checkpoint; its MLflow run gets the results
    evaluate_every: int = 0  # epochs between teachers that are kept in teachers/ and evaluated by `evaluate`; 0 means never
    evaluate: str = "knn"  # evaluation of each kept teacher: a task, and its options after spaces
    then: list[str] = field(default_factory=list)  # evaluations after the end of training, e.g. [knn,'linear epochs=50']
    start_epoch: int = 0  # with `checkpoint`: the epoch (from 0) at which schedules and data order begin
    fresh_heads: FreshHeads = FreshHeads.none  # heads (with prototypes and centre) not from `checkpoint` but anew: none, region or all
    resize_positions: bool = False  # resize tables of positions (bicubic) from `checkpoint` made with other windows or another image size
    plan: bool = False  # print sizes, memory, time, disk and sbatch script of a pre-training; runs and writes nothing, needs no data
    planning: Planning = field(default_factory=Planning)
    search: Search = field(default_factory=Search)
