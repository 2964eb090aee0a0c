"""Options of the tasks around a run: what a store lacks, other formats, published checkpoints, the cost of a backbone."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.schema.tasks.frozen import Network


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
    checkpoint = "checkpoint"


@dataclass
class Export:
    _target_: str = "esvit.tasks.export.Export"
    has_run_folder: bool = False
    format: ExportFormat = (
        ExportFormat.backbone
    )  # or safetensors, onnx, torch_export, timm, hf (Hugging Face), mmdet, detectron2, checkpoint
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
    train_step: bool = True  # measure training steps of the backbone too: forward, backward, and an update
    table: str | None = None  # Markdown file whose table gets the backbone's row, or null
    backbone: Any = "${backbone}"
    in_channels: int = "${backbone.in_channels}"  # type: ignore[assignment]
    name: str = "${name}"


SCHEMAS = {
    ("task", "sync"): Sync,
    ("task", "export"): Export,
    ("task", "zoo"): Zoo,
    ("task", "throughput"): Throughput,
}
