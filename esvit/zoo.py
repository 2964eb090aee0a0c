"""The published models as data (zoo.json: every row of the original README's tables), and their checkpoints in a folder of this machine.

Imports no torch.
"""

import difflib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from esvit.download import fetch
from esvit.errors import OptionError

DATA = Path(__file__).with_name("zoo.json")
TOKEN_VARIABLE = "ESVIT_ZOO_TOKEN"


@dataclass(frozen=True)
class Model:
    """One published model.

    name          of the model and of its experiment file, published/<name>
    backbone      the choice of backbone= that it has
    table         of the README that it stands in
    tasks         V: view loss only, V+R: view and region losses
    batch_size    images per step over all GPUs; None where the table does not say
    linear, knn   top-1 accuracy on ImageNet-1K (%)
    files         checkpoint, train_log, linear_log, knn_log: place below the storage's address
    """

    name: str
    backbone: str
    table: str
    architecture: str
    parameters: str
    tasks: str
    dataset: str
    batch_size: int | None
    linear: float
    knn: float
    files: dict[str, str]

    def urls(self, server: str) -> dict[str, str]:
        """Addresses of the files, without an access token."""
        return {kind: f"{server.rstrip('/')}/{place}" for kind, place in self.files.items()}


@cache
def models() -> dict[str, Model]:
    """All published models by name, in the order of the tables."""
    return {row["name"]: Model(**row) for row in json.loads(DATA.read_text())["rows"]}


def published_server() -> str:
    """The address that the README's links begin with."""
    return json.loads(DATA.read_text())["server"]


def model(name: str) -> Model:
    """The model of that name. Raises OptionError with close matches for an unknown one."""
    if name in models():
        return models()[name]
    close = difflib.get_close_matches(name, models(), n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(close)}?" if close else "see the names in the table of python run.py task=zoo"
    raise OptionError("task.model", f"there is no published model '{name}'", remedy)


def home() -> Path:
    """Folder of everything that is downloaded: the environment variable ESVIT_HOME, or ~/.cache/esvit."""
    return Path(os.environ.get("ESVIT_HOME") or "~/.cache/esvit").expanduser().absolute()


def checkpoint_file(chosen: Model) -> Path:
    """Where the model's checkpoint is kept here; a file put there by hand serves as well."""
    return home() / "checkpoints" / f"{chosen.name}.pth"


def fetch_checkpoint(chosen: Model, *, server: str, token: str | None) -> Path:
    """The model's checkpoint on this machine, downloaded if it is not there yet.

    token  the storage's access token (a query string); None: the environment variable ESVIT_ZOO_TOKEN, if it is set

    Raises OptionError when it cannot be had, or is not what it was.
    """
    return fetch(
        chosen.urls(server)["checkpoint"],
        checkpoint_file(chosen),
        token=token or os.environ.get(TOKEN_VARIABLE),
        option="task.model",
        token_option=f"task.token='QUERY STRING' or in {TOKEN_VARIABLE}",
    )


def table() -> str:
    """One line per model, under the heading of its table."""
    lines = [_line("name", "architecture", "params", "tasks", "data set", "batch", "linear %", "k-NN %")]
    heading = ""
    for each in models().values():
        if each.table != heading:
            heading = each.table
            lines += ["", heading]
        batch = "-" if each.batch_size is None else str(each.batch_size)
        numbers = (f"{each.linear:.1f}", f"{each.knn:.1f}")
        lines.append(_line(each.name, each.architecture, each.parameters, each.tasks, each.dataset, batch, *numbers))
    return "\n".join(lines)


def _line(name: str, architecture: str, parameters: str, tasks: str, dataset: str, batch: str, linear: str, knn: str) -> str:
    return f"{name:<28}{architecture:<22}{parameters:>6}  {tasks:<6}{dataset:<15}{batch:>5}{linear:>10}{knn:>8}"
