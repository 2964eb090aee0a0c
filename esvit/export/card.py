"""The model card that goes with every export: what it is, where it comes from, how far it was checked, how to load it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

FROM_CONFIG = ("backbone", "head", "loss", "augmentation", "data", "optimizer", "schedule", "epochs", "max_steps", "precision", "task")
OF_THE_MACHINE = ("speed/", "system/", "memory/", "schedule/", "images_per_second")  # metrics
PLACES = ("root", "val_root")  # of a machine, not of a model
PRE_TRAINED = "A backbone pre-trained without labels by matching views and regions (EsViT)."
TRAINED_BY = {"finetune": "A backbone fine-tuned, all of it, to name the classes of labelled images."}  # task -> the first sentence


@dataclass(frozen=True)
class Source:
    """The checkpoint that was exported, and what its run folder knows.

    sha256   of the file
    origin   who made it
    network  student or teacher
    config   the options of the run, or None
    metrics  its final metrics, or None
    """

    file: Path
    sha256: str
    origin: str
    network: str
    config: dict[str, Any] | None
    metrics: dict[str, float] | None


def read_run(checkpoint: Path) -> tuple[dict[str, Any] | None, dict[str, float] | None]:
    """Config and metrics of the run folder that the checkpoint lies in, as far as it is one."""
    config, metrics = checkpoint.parent / "config.yaml", checkpoint.parent / "metrics.json"
    return (
        yaml.safe_load(config.read_text()) if config.exists() else None,
        json.loads(metrics.read_text()) if metrics.exists() else None,
    )


def card(*, name: str, format: str, facts: dict[str, str], source: Source, usage: str, note: str) -> str:
    """Markdown. `facts` are rows of its table, besides those of the source."""
    rows = {
        "format": format,
        "network": source.network,
        "source checkpoint": f"{source.file.name}, made by {source.origin}",
        "its sha256": source.sha256,
        **facts,
        "written with": f"torch {torch.__version__}",
    }
    return "\n".join(
        [
            f"# {name}",
            "",
            TRAINED_BY.get((source.config or {}).get("choices", {}).get("task"), PRE_TRAINED),
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
            "## Load it",
            "",
            "```python",
            usage,
            "```",
            "",
            note,
            "",
            "## Metrics",
            "",
            *_metrics(source),
            "",
            "## Config and data",
            "",
            *_config(source),
            "",
        ]
    )


def _metrics(source: Source) -> list[str]:
    if source.metrics is None:
        return ["Not known: the checkpoint does not lie in the folder of a finished run."]
    numbers = {key: value for key, value in source.metrics.items() if isinstance(value, int | float) and not key.startswith(OF_THE_MACHINE)}
    return ["| | |", "| --- | --- |", *(f"| {key} | {value:.6g} |" for key, value in numbers.items())]


def _config(source: Source) -> list[str]:
    if source.config is None:
        return ["Not known: the checkpoint does not lie in a run folder."]
    chosen = {key: _without_places(source.config[key]) for key in FROM_CONFIG if key in source.config}
    return ["```yaml", yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True).rstrip(), "```"]


def _without_places(value: Any) -> Any:
    return {key: each for key, each in value.items() if key not in PLACES} if isinstance(value, dict) else value
