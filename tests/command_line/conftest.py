"""One server of processes, one folder of images and one uninterrupted run, shared by all tests of a worker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line.commands import TINY, ForkServer, succeeded
from tests.data.pictures import write_classes


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """`train` with 16 images of two classes, `val` with six."""
    folder = tmp_path_factory.mktemp("images")
    write_classes(folder / "train", {"cat": 8, "dog": 8})
    write_classes(folder / "val", {"cat": 3, "dog": 3})
    return folder


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny(images) -> tuple[str, ...]:
    """Options of a run of eight steps."""
    return (*TINY, f"data.root={images / 'train'}")


@pytest.fixture(scope="session")
def reference(commands, tiny, tmp_path_factory) -> Path:
    """The run folder of a run that nothing interrupted; not to be written to."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    succeeded(commands.run(*tiny, f"output_dir={folder}"))
    return folder
