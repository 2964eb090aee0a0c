"""One folder per run: what is in it, and whether a config may go on in it. Imports no torch.

config.yaml   the resolved options          metrics.json   final metrics, once the run has finished
log.jsonl     one object per logged step    checkpoint.pt  latest state, checkpoint_<step>.pt the kept ones (or folders of shares)
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import yaml

from esvit.errors import OptionError

# A resumed run may change these: they do not change what is computed, or only how far.
_FREE = ("output_dir", "name", "device", "launcher", "tracking", "max_steps", "checkpoint", "choices", "then", "evaluate", "evaluate_every",
         "task.sharding", "task.shard_prototypes", "task.checkpoint_writing", "task.checkpoint_shares", "runtime.threads",
         "runtime.timeout_minutes", "runtime.stall_minutes", "data.workers", "data.cache", "data.cache_gb", "data.index_cache")  # fmt: skip


class RunFolder:
    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.json"

    def admit(self, config: dict[str, Any]) -> None:
        """Check that a run with `config` may begin here, or go on; writes nothing.

        Raises OptionError with the list of options that a resumed run must not change.
        """
        if self.config_file.exists():
            before = self.config()
            self._refuse_changes(before, config)
            if config["epochs"] > before["epochs"]:
                warnings.warn(
                    f"epochs: raised from {before['epochs']} to {config['epochs']}; the schedules stretch with it, so the run is not what "
                    f"{config['epochs']} epochs from the start would be",
                    stacklevel=2,
                )
        elif self.path.exists() and not self.path.is_dir():
            raise OptionError("output_dir", f"'{self.path}' is a file", "give a folder")

    def begin(self, config: dict[str, Any]) -> None:
        """Make the folder, if need be, and write `config` into it. An extended run loses its `metrics.json`: it is not finished any more.

        Raises OptionError if it cannot be written, or if another run has begun in it since `admit`.
        """
        if self.config_file.exists():
            self._refuse_changes(self.config(), config)
        if self.metrics_file.exists() and not self.is_finished(config):
            self.metrics_file.unlink()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config_file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise OptionError(
                "output_dir", f"cannot write to '{self.path}' ({error.strerror})", "give a folder that can be written"
            ) from None

    def config(self) -> dict[str, Any]:
        """The options of the run in it."""
        return yaml.safe_load(self.config_file.read_text())

    def is_finished(self, config: dict[str, Any]) -> bool:
        """Whether the run in it went as far as `config` asks."""
        if not self.metrics_file.exists():
            return False
        before = self.config()
        if before["epochs"] != config["epochs"]:
            return False
        reached = json.loads(self.metrics_file.read_text())["step"]
        return before["max_steps"] == config["max_steps"] or (config["max_steps"] is not None and config["max_steps"] <= reached)

    def _refuse_changes(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        old, new = flatten(before), flatten(now)
        changed = [key for key in sorted(old | new) if old.get(key) != new.get(key) and not _is_free(key)]
        if "epochs" in changed and new["epochs"] > old["epochs"]:
            changed.remove("epochs")
        if changed:
            described = ", ".join(f"{key} ({old.get(key)} -> {new.get(key)})" for key in changed)
            raise OptionError(
                "output_dir",
                f"'{self.path}' holds a run with other options: {described}",
                "give these back their values, or another output_dir",
            )


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def write_atomically(path: Path, text: str) -> None:
    """Whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)
