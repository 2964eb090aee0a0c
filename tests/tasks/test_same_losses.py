"""The storage format changes nothing: from folder, zip, TSV and tar shards the same seed trains bit for bit alike, with any workers."""

import base64
import copy
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit.data.folder import FolderData
from esvit.run_folder import RunFolder
from esvit.runtime import Runtime
from esvit.tasks.pack import Pack
from esvit.tracking.base import NoTracking
from run import build
from tests.command_line.commands import TINY, losses
from tests.data.pictures import data_options, write_classes
from tests.tasks.composition import composed

STEPS = 10
FORMATS = {
    "folder": {"_target_": "esvit.data.folder.FolderData"},
    "zip": {"_target_": "esvit.data.zip.ZipData"},
    "tsv": {"_target_": "esvit.data.tsv.TsvData", "label_map": None, "open_files": 1},
    "shards": {"_target_": "esvit.data.shards.ShardsData", "cache": "unused", "cache_gb": 1.0},
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """The same 24 images in four formats."""
    root = tmp_path_factory.mktemp("formats")
    files = write_classes(root / "folder", {"ant": 10, "bee": 14})
    labels = [["ant", "bee"].index(file.parent.name) for file in files]
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(root / "folder"))
    lines = [f"train.zip@/{file.relative_to(root / 'folder')}\t{label}\n" for file, label in zip(files, labels, strict=True)]
    (root / "train_map.txt").write_text("".join(lines))
    rows = [f"{file.name}\t{label}\t{base64.b64encode(file.read_bytes()).decode()}\n" for file, label in zip(files, labels, strict=True)]
    (root / "train.tsv").write_text("".join(rows))
    data = FolderData(**data_options(root=str(root / "folder")))
    Pack(data=data, shard_images=7, shard_mb=1.0, verify=True, folder=str(root / "shards")).run()
    return {"folder": root / "folder", "zip": root, "tsv": root, "shards": root / "shards" / "train"}


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return composed(*TINY, f"max_steps={STEPS}", "task.log_every=1", "epochs=2", "data.root=unused")


def trained(folder: Path, options: dict[str, Any], data: dict[str, Any]) -> list[dict]:
    """What the log says of the first steps, system and speed apart."""
    task = copy.deepcopy(options["task"]) | {"data": data_options(batch_size=4) | data}
    threads = torch.get_num_threads()
    with Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1, stall_minutes=0) as runtime:
        runtime.records_to(RunFolder(folder), tracking=NoTracking(host=None), config=options["chosen"])
        try:
            build(task).run(runtime)
        finally:
            torch.set_num_threads(threads)
    return losses(folder)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, roots, options) -> list[dict]:
    return trained(tmp_path_factory.mktemp("expected"), options, FORMATS["folder"] | {"root": str(roots["folder"])})


@pytest.mark.parametrize(("name", "workers"), [("folder", 2), ("zip", 0), ("tsv", 2), ("shards", 0), ("shards", 2)])
def test_every_format_gives_the_same_losses_bit_for_bit(tmp_path, roots, options, expected, name, workers):
    assert [record["step"] for record in expected] == list(range(1, STEPS + 1))
    assert len({record["loss/total"] for record in expected}) == STEPS
    assert trained(tmp_path, options, FORMATS[name] | {"root": str(roots[name]), "workers": workers}) == expected
