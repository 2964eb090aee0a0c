"""Options of the tasks: what a run does."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.schema.inputs import Mixing, Normalize


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


@dataclass
class Pretrain:
    _target_: str = "esvit.tasks.pretrain.Pretrain"
    has_run_folder: bool = True
    accumulation: int = 1  # micro-batches per optimizer step
    log_every: int = 10  # optimizer steps between log records (the only times the host waits for the device)
    health_every: int = 100  # optimizer steps between label-free signs of health; 0 means never
    checkpoint_keep: int = 2  # how many checkpoint_<step>.pt to keep
    online_knn: OnlineKnn = field(default_factory=OnlineKnn)
    mixing: Mixing = field(default_factory=Mixing)
    normalize: Normalize = field(default_factory=Normalize)
    backbone: Any = "${backbone}"
    head: Any = "${head}"
    loss: Any = "${loss}"
    augmentation: Any = "${augmentation}"
    data: Any = "${data}"
    optimizer: Any = "${optimizer}"
    schedule: Any = "${schedule}"
    epochs: int = "${epochs}"  # type: ignore[assignment]
    max_steps: int | None = "${max_steps}"  # type: ignore[assignment]
    checkpoint_every: int = "${checkpoint_every}"  # type: ignore[assignment]
    checkpoint: str | None = "${checkpoint}"
    start_epoch: int = "${start_epoch}"  # type: ignore[assignment]
    fresh_heads: Any = "${fresh_heads}"
    resize_positions: bool = "${resize_positions}"  # type: ignore[assignment]


@dataclass
class Sync:
    _target_: str = "esvit.tasks.sync.Sync"
    has_run_folder: bool = False
    folder: str = "${output_dir}"
    uri: str | None = None  # send to this tracking store instead of the one that the run was made with


class ExportFormat(Enum):
    backbone = "backbone"
    safetensors = "safetensors"
    onnx = "onnx"
    torch_export = "torch_export"
    timm = "timm"
    hf = "hf"
    mmdet = "mmdet"
    detectron2 = "detectron2"


class Network(Enum):
    teacher = "teacher"
    student = "student"


@dataclass
class Export:
    _target_: str = "esvit.tasks.export.Export"
    has_run_folder: bool = False
    format: ExportFormat = ExportFormat.backbone  # backbone, safetensors, onnx, torch_export, timm, hf (Hugging Face), mmdet, detectron2
    network: Network = Network.teacher  # teacher or student: whose backbone
    image_size: int = 224  # side of the images that it will see (pixels); timm and hf need the backbone's own, backbone.image_size
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # of the normalisation that it was trained with, for the card
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    backbone: Any = "${backbone}"
    checkpoint: str | None = "${checkpoint}"
    folder: str = "${output_dir}"
    name: str = "${name}"


@dataclass
class Zoo:
    _target_: str = "esvit.tasks.zoo.Zoo"
    has_run_folder: bool = False
    model: str | None = None  # name of the published model whose checkpoint is fetched; null prints the table of all
    token: str | None = None  # the storage's access token, a query string; null means that of the environment variable ESVIT_ZOO_TOKEN
    server: str | None = None  # address of a copy of the storage; null means the published one


@dataclass
class Throughput:
    _target_: str = "esvit.tasks.throughput.Throughput"
    has_run_folder: bool = True
    batch_size: int = 16  # images per pass
    image_size: int = 224  # side of the images (pixels)
    repeats: int = 10  # timed passes, of which the median counts
    table: str | None = None  # Markdown file whose table gets the backbone's row, or null
    backbone: Any = "${backbone}"
    in_channels: int = "${backbone.in_channels}"  # type: ignore[assignment]
    name: str = "${name}"


SCHEMAS = {
    ("task", "pretrain"): Pretrain,
    ("task", "sync"): Sync,
    ("task", "export"): Export,
    ("task", "zoo"): Zoo,
    ("task", "throughput"): Throughput,
}
