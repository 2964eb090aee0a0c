"""`tracking.json`: what an MLflow store must be told of a run, and how much of it the store has confirmed.

It is written before the first contact with a store, so `task=sync` can create and fill a run that no store ever heard of.
The state belongs to one store: with another `uri`, what was sent is forgotten, and the run is looked up there by `folder_id`.
"""

import dataclasses
import json
import logging
import threading
import uuid
from pathlib import Path
from typing import Any

from esvit.tracking.files import replace_file

STATE_NAME = "tracking.json"
_warnings = logging.getLogger(__name__)


@dataclasses.dataclass
class RunState:
    """folder_id        this run folder's own name in a store: the tag by which its run is found again
    uri              the store, None when the run is tracked nowhere
    start_time       milliseconds since 1970, like end_time and final_time
    params, tags     as they are sent
    last_step        the last step that the store confirmed
    artifacts        file relative to the run folder -> folder in the store
    artifacts_sent   the same file -> [size in bytes, mtime in ns] when it was last sent
    final            final metrics, at final_step
    host             run folder of the pre-training that this run evaluates: its run in the store gets the final metrics too, or None
    host_step        the step of the weights that were evaluated
    host_run_id      the host's run, once its metrics have arrived there
    status           RUNNING, FINISHED, FAILED or KILLED; status_sent is the last one that the store confirmed
    """

    folder_id: str
    start_time: int
    uri: str | None = None
    experiment_name: str = ""
    run_name: str = ""
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    experiment_id: str | None = None
    run_id: str | None = None
    last_step: int = 0
    artifacts: dict[str, str] = dataclasses.field(default_factory=dict)
    artifacts_sent: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    final: dict[str, Any] = dataclasses.field(default_factory=dict)
    final_step: int = 0
    final_time: int = 0
    final_sent: bool = True
    host: str | None = None
    host_step: int = 0
    host_run_id: str | None = None
    status: str = "RUNNING"
    status_sent: str | None = None
    end_time: int | None = None


class StateFile:
    """The state and its file: `update` changes both, from any thread."""

    def __init__(self, folder: Path, state: RunState):
        self.folder = folder
        self.state = state
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path, *, now_milliseconds: int) -> "StateFile":
        """The folder's state, or a fresh one, which is not written yet."""
        fresh = RunState(folder_id=uuid.uuid4().hex, start_time=now_milliseconds)
        path = folder / STATE_NAME
        if not path.exists():
            return cls(folder, fresh)
        try:
            return cls(folder, RunState(**json.loads(path.read_bytes())))
        except (ValueError, TypeError) as error:
            _warnings.warning("%s is damaged (%s): this run starts a new one in its MLflow store", path, error)
            return cls(folder, fresh)

    def update(self, **changes: Any) -> None:
        """Set fields and write the file. A change to a dictionary is given as the entries to add."""
        with self._lock:
            for name, value in changes.items():
                old = getattr(self.state, name)
                if isinstance(old, dict) and name.startswith("artifacts"):
                    value = {**old, **value}
                setattr(self.state, name, value)
            replace_file(self.folder / STATE_NAME, json.dumps(dataclasses.asdict(self.state), indent=1).encode())

    def point_to(self, uri: str | None) -> None:
        """Send to the store at `uri` from now on."""
        if uri != self.state.uri:
            with self._lock:
                self.state.artifacts_sent = {}
            self.update(
                uri=uri, run_id=None, host_run_id=None, experiment_id=None, last_step=0, status_sent=None, final_sent=not self.state.final
            )
