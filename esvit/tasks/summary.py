"""The end of a pre-training run: its final metrics, its report, and the short table on the console."""

import datetime
import platform
from pathlib import Path

import torch

from esvit.evaluation.report import write_report
from esvit.tracking.environment import source_state

_ACCURACY_ROWS = {
    "knn/raw_pixels": "k-NN of raw pixels",
    "knn/color_histogram": "k-NN of colour histograms",
    "knn/untrained": "k-NN of the untrained network",
    "knn/teacher": "k-NN of the trained teacher",
    "linear/online_validation_top1": "linear probe on the side",
}


def final_metrics(records: list[dict], *, step: int, images_per_step: int) -> dict[str, float]:
    """The last value of every metric that was logged, and how far the run went; flat."""
    metrics: dict[str, float] = {}
    for record in records:
        metrics |= {name: value for name, value in record.items() if name not in ("step", "epoch", "time")}
    if speed := _images_per_second(records):
        metrics["images_per_second"] = speed
    metrics |= {"step": step, "epoch": records[-1]["epoch"] if records else 0, "images_seen": step * images_per_step}
    return metrics


def _images_per_second(records: list[dict]) -> float | None:
    """Over the steps of training alone: without evaluations, checkpoints, and what came before the first step."""
    spans = [
        (record["step"] - before, record["speed/images_per_second"])
        for before, record in zip([0, *(record["step"] for record in records)], records, strict=False)
        if record.get("speed/images_per_second")
    ]
    return sum(steps for steps, _ in spans) / sum(steps / speed for steps, speed in spans) if spans else None


def write_run_report(folder: Path, *, records: list[dict], metrics: dict[str, float], config: dict, crops: Path, notes: list[str]) -> Path:
    """`report.html` in `folder`."""
    path = folder / "report.html"
    source = source_state(Path(__file__))
    write_report(
        path,
        title=config["name"],
        facts={
            "run folder": folder.name,
            "commit": f"{source.commit[:10]}{' and changes' if source.dirty else ''}" if source else "not a git checkout",
            "finished": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
            "host": f"{platform.node()}, {platform.machine()}",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        },
        config=config,
        records=records,
        metrics=metrics,
        crops_png=crops,
        notes=notes,
    )
    return path


def table(metrics: dict[str, float], *, folder: Path, report: Path, view_command: str | None) -> list[str]:
    """Lines for the console; `view_command` opens the tracking store in a browser."""
    rows = [(label, f"{metrics[name]:.1f} %") for name, label in _ACCURACY_ROWS.items() if name in metrics]
    if "images_per_second" in metrics:
        rows.append(("images per second", f"{metrics['images_per_second']:.1f}"))
    rows += [("run folder", str(folder)), ("report", str(report))]
    if view_command is not None:
        rows.append(("compare in MLflow", view_command))
    width = max(len(label) for label, _ in rows)
    return ["", *(f"{label:<{width}}  {text}" for label, text in rows)]
