"""Options of where a run happens and where its results go: runtime, launcher, tracking."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class ContainerRuntime(Enum):
    pyxis = "pyxis"
    apptainer = "apptainer"


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
    parallel: int = 1  # how many runs of a sweep at once, each in a process of its own


@dataclass
class Gpus:
    _target_: str = "launchers.gpus.Gpus"
    processes: int = 0  # processes on this machine; 0 means one per GPU
    grace_seconds: float = 60.0  # how long the others may go on after one has ended on a signal
    parallel: int = 1  # how many runs of a sweep at once, each with so many processes and as many GPUs


@dataclass
class Slurm:
    _target_: str = "launchers.slurm.Slurm"
    nodes: int = 1  # machines
    gpus_per_node: int = 1  # GPUs on each of them; 0 asks for none (device=cpu)
    tasks_per_node: int | None = None  # processes on each of them; null means one per GPU, or one
    cpus_per_task: int = 10  # CPU cores per process: its data.workers, and some
    memory: str | None = None  # per machine, e.g. 200G; "0" means all of it, null means what the cluster gives
    timeout_minutes: int = 1440  # time limit; a job that reaches it goes back into the queue and goes on from there
    signal_delay_seconds: int = 120  # how long before the time limit the run is told to write its checkpoint
    max_requeues: int = 30  # how often a job may put itself back into the queue, after preemption or at its time limit
    partition: str | None = None  # null means the cluster's default, here and below
    account: str | None = None  # who pays
    qos: str | None = None  # quality of service
    constraint: str | None = None  # features that the machines must have, e.g. "a100|h100"
    exclude: str | None = None  # machines not to use, e.g. "node[3-4]"
    comment: str | None = None  # a text that the cluster keeps with the job
    array_parallelism: int = 16  # how many runs of a sweep at once
    evaluation_nodes: int = 1  # machines for evaluations (then, evaluate_every)
    evaluation_gpus_per_node: int | None = None  # GPUs on each of them; null means gpus_per_node
    evaluation_timeout_minutes: int | None = None  # their time limit; null means timeout_minutes
    extra: list[str] = field(default_factory=list)  # further options of sbatch, e.g. ["--reservation=maintenance","--mail-type=END"]
    setup: list[str] = field(default_factory=list)  # shell commands before the run, e.g. ["module load cuda"]
    container_image: str | None = None  # run in this image: a name or path that container_runtime understands
    container_runtime: ContainerRuntime = ContainerRuntime.pyxis  # pyxis or apptainer
    container_mounts: list[str] = field(default_factory=list)  # further folders that the container sees, "/data" or "/from:/to"
    python: str | None = None  # the Python of the ranks; null means the one that submits, or python3 in a container


@dataclass
class Command:
    _target_: str = "launchers.command.Command"
    template: str = MISSING  # shell command that submits a job; {command}, {script}, {folder} and {name} are replaced in it
    cancel: str | None = None  # shell command that ends it; {name}, {folder}, and {id}: the last line that the template's command printed
    processes: int = 0  # processes on the machine that runs the job; 0 means one per GPU there
    grace_seconds: float = 60.0  # how long the others may go on after one has ended on a signal
    python: str | None = None  # the Python of that machine; null means the one that submits


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
    ("launcher", "slurm"): Slurm,
    ("launcher", "command"): Command,
    ("tracking", "mlflow"): Mlflow,
    ("tracking", "none"): NoTracking,
}
