"""Options of where a run happens and where its results go: runtime, launcher, tracking."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Runtime:
    _target_: str = "esvit.runtime.Runtime"
    deterministic: bool | None = None  # only algorithms that repeat bit for bit; null means on CPU only
    threads: int | None = None  # CPU threads per process; null means all cores divided by the processes on this machine
    timeout_minutes: float = 30.0  # how long a collective may wait for the other processes
    stall_minutes: float = 20.0  # a run without progress for so long writes every rank's stack into errors/ and ends; 0 means never
    device: Any = "${device}"
    precision: Any = "${precision}"
    seed: int = "${seed}"  # type: ignore[assignment]


@dataclass
class Local:
    _target_: str = "launchers.local.Local"


@dataclass
class Gpus:
    _target_: str = "launchers.gpus.Gpus"
    processes: int = 0  # processes on this machine; 0 means one per GPU
    grace_seconds: float = 60.0  # how long the others may go on after one has ended on a signal


@dataclass
class Mlflow:
    _target_: str = "esvit.tracking.mlflow.Mlflow"
    uri: str = "sqlite:///outputs/mlflow.db"  # tracking store: sqlite:///FILE or http(s)://SERVER
    experiment_name: str = "esvit"  # the MLflow experiment that the run belongs to
    run_name: str = "${name}"
    tags: dict[str, str] = field(default_factory=dict)  # further tags of the run
    host: str | None = "${of}"
    close_timeout_seconds: float = 30.0  # how long the end of a run waits for a slow server; task=sync sends the rest


@dataclass
class NoTracking:
    _target_: str = "esvit.tracking.base.NoTracking"
    host: str | None = "${of}"


SCHEMAS = {
    ("runtime", "default"): Runtime,
    ("launcher", "local"): Local,
    ("launcher", "gpus"): Gpus,
    ("tracking", "mlflow"): Mlflow,
    ("tracking", "none"): NoTracking,
}
