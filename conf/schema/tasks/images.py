"""Options of the tasks that are about images alone: packing them into shards, and looking at their views."""

from dataclasses import dataclass, field
from typing import Any

from conf.schema.augmentations import Mixing


@dataclass
class Pack:
    _target_: str = "esvit.tasks.pack.Pack"
    has_run_folder: bool = False
    shard_mb: float = 256.0  # size of a shard (MB)
    shard_images: int | None = None  # or images per shard; null means by shard_mb
    verify: bool = True  # decode every image and leave out those that cannot be; false copies twice as fast or more
    data: Any = "${data}"
    folder: str = "${output_dir}"


@dataclass
class Preview:
    _target_: str = "esvit.tasks.preview.Preview"
    has_run_folder: bool = False
    images: int = 6  # images that are shown
    mixing: Mixing = field(default_factory=Mixing)
    data: Any = "${data}"
    sampler: Any = "${sampler}"
    augmentation: Any = "${augmentation}"
    seed: int = "${seed}"  # type: ignore[assignment]
    folder: str = "${output_dir}"


SCHEMAS = {
    ("task", "preview"): Preview,
    ("task", "pack"): Pack,
}
