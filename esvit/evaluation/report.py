"""The page that a run leaves behind: what it reached, how it went and with what options, in one file that opens anywhere.

Whatever a run did not log is left out.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from esvit.evaluation.figures import Panel, curves_svg
from esvit.evaluation.page import configuration, data_url, metrics_table, number, section, write_page

KNN_ROWS = {  # metric -> what the page calls it; the last is the one that counts
    "knn/raw_pixels": "Raw pixels",
    "knn/color_histogram": "Colour histogram",
    "knn/untrained": "Untrained network",
    "knn/teacher": "Trained teacher",
}

LEARNING = (
    Panel(
        "Loss",
        "Should fall, steeply at first. It rises while the teacher's temperature does, so only values at one temperature compare. "
        "A line stuck at log K (the log of the number of prototypes) is a network that learns nothing.",
        "cross-entropy (nats)",
        {"total": "loss/total", "view": "loss/view", "region": "loss/region"},
    ),
    Panel(
        "k-NN accuracy during training",
        "The teacher's frozen features, classified by their nearest labelled neighbours. This is the one curve here that measures "
        "usefulness: it should climb above the dashed lines.",
        "top-1 accuracy (%)",
        {"teacher": "knn/teacher"},
    ),
)

HEALTH = (
    Panel(
        "Entropy",
        "How undecided the outputs are, as a share of log K. Teacher near 1 with a student just as high: uniform collapse. "
        "Teacher near 0: it names one prototype per image, with nothing soft left to learn from.",
        "share of log K",
        {"teacher": "health/teacher_entropy_share", "student": "health/student_entropy_share"},
        from_zero=True,
    ),
    Panel(
        "KL of teacher and student",
        "What the student has still to learn: the view loss without the teacher's own entropy. Zero for long means collapse, not success.",
        "KL divergence (nats)",
        {"KL": "health/kl"},
        from_zero=True,
    ),
    Panel(
        "Feature spread",
        "Standard deviation of the features' directions: 1 is spread evenly, 0 is every image at one point.",
        "standard deviation × √D",
        {"spread": "health/feature_std"},
        from_zero=True,
    ),
    Panel(
        "RankMe",
        "How many dimensions the features of one batch really use. Higher is richer; a steady fall is dimensional collapse.",
        "effective rank",
        {"RankMe": "health/rank_me"},
        from_zero=True,
    ),
    Panel(
        "Prototypes in use",
        "Different prototypes that come first for some view of the batch, as a share of the most there could be.",
        "share of the most possible",
        {"in use": "health/prototypes_used"},
        from_zero=True,
    ),
    Panel(
        "Norm of the centre",
        "The running mean that is taken off the teacher's outputs. It settles; endless growth is a chase after a collapsing teacher.",
        "Euclidean norm",
        {"centre": "health/center_norm"},
        from_zero=True,
    ),
)

COURSE = (
    Panel("Learning rate", "Linear warm-up, then cosine.", "learning rate", {"learning rate": "learning_rate"}, from_zero=True),
    Panel("Teacher momentum", "How slowly the teacher follows the student.", "momentum", {"momentum": "momentum"}),
    Panel("Teacher temperature", "Lower is sharper.", "temperature", {"temperature": "temperature"}),
    Panel("Weight decay", "Of weight matrices only.", "weight decay", {"weight decay": "weight_decay"}, from_zero=True),
    Panel(
        "Gradient norm", "Before clipping. Spikes are normal early on; growth over epochs is not.", "L2 norm", {"gradient": "gradient_norm"}
    ),
    Panel(
        "Throughput",
        "All processes together. Dips are evaluations and checkpoints.",
        "images / s",
        {"images / s": "images_per_second"},
        from_zero=True,
    ),
    Panel(
        "Waiting for data",
        "Share of the time in which no batch was ready. Well above 0.1: more data.workers.",
        "share of time",
        {"waiting": "data_wait_share"},
        from_zero=True,
    ),
)

HEALTH_ROWS = {  # metric -> name, unit, what is healthy
    "health/teacher_entropy": ("Teacher entropy", "nats", "clearly below log K, clearly above 0"),
    "health/student_entropy": ("Student entropy", "nats", "above the teacher's, falling"),
    "health/kl": ("KL (teacher ‖ student)", "nats", "above 0, falling slowly"),
    "health/center_norm": ("Norm of the centre", "", "settled"),
    "health/prototypes_used": ("Prototypes in use", "share", "many; one prototype for all is collapse"),
    "health/feature_std": ("Feature spread", "1 = even", "above 0.1; 0 is collapse to one point"),
    "health/rank_me": ("RankMe", "dimensions", "well above 1, not falling"),
}


def write_report(
    path: Path,
    *,
    title: str,
    facts: dict[str, str],
    config: dict,
    records: Sequence[dict],
    metrics: dict[str, float],
    crops_png: bytes | Path | None,
    notes: Sequence[str] = (),
) -> None:
    """One self-contained HTML file at `path`, replaced as a whole (a reader never sees half of it).

    title      name of the run
    facts      label -> text for the head of the page, in order: "commit", "date", "device" ...
    config     the resolved configuration: nested dicts of plain values
    records    lines of log.jsonl, in order of their step
    metrics    final metrics, as in metrics.json
    crops_png  figures.crops_grid, or a file with it
    notes      sentences a reader has to know first: alarms, warnings, how the numbers were taken
    """
    picture = crops_png.read_bytes() if isinstance(crops_png, Path) else crops_png
    sections = [
        section("Result", _knn_table(metrics)),
        section("Learning", _figures([_with_levels(panel, metrics) for panel in LEARNING], records)),
        section("What the network sees", _crops(picture)),
        section("Health, without labels", _figures(HEALTH, records) + _health_table(records)),
        section("Schedules and speed", _figures(COURSE, records)),
        section("Final metrics", metrics_table(metrics)),
        section("Configuration", configuration(config)),
    ]
    write_page(path, kind="EsViT pre-training report", title=title, facts=facts, notes=notes, sections=sections)


def _knn_table(metrics: dict[str, float]) -> str:
    rows = _accuracies(metrics)
    if not rows:
        return ""
    cells = "".join(
        f'<tr{" class=ours" if name == "Trained teacher" else ""}><th scope="row">{name}</th>'
        f'<td class="bar"><span style="width:{max(0.0, min(100.0, value)):.2f}%"></span></td><td class="number">{value:.1f}%</td></tr>'
        for name, value in rows.items()
    )
    return (
        f'<p class="verdict">{html.escape(_verdict(rows))}</p><div class="card"><table class="bars"><tbody>{cells}</tbody></table>'
        '<p class="caption">Top-1 accuracy of a weighted k-nearest-neighbour classifier on the validation images. All rows see the same '
        "images and the same neighbours; only the features differ. Labels serve this measurement alone, never training.</p></div>"
    )


def _accuracies(metrics: dict[str, float]) -> dict[str, float]:
    """What was measured, by the page's names; a value that was not finite (null in the log) is as good as none."""
    known = {name: metrics.get(metric) for metric, name in KNN_ROWS.items()}
    return {name: value for name, value in known.items() if value is not None and math.isfinite(value)}


def _verdict(rows: dict[str, float]) -> str:
    """One plain sentence: against what the trained teacher wins and loses."""
    if "Trained teacher" not in rows:
        return "The trained teacher was not measured."
    ours = rows["Trained teacher"]
    others = [(ours - value, _mid_sentence(name)) for name, value in rows.items() if name != "Trained teacher"]
    ahead = [f"{name} by {gain:.1f}" for gain, name in others if round(gain, 1) > 0]
    behind = [f"{name} by {-gain:.1f}" for gain, name in others if round(gain, 1) < 0]
    level = [name for gain, name in others if round(gain, 1) == 0]
    parts = []
    if ahead:
        parts.append(f"beats {_join(ahead)} points")
    if level:
        parts.append(f"equals {_join(level)}")
    if behind:
        parts.append(f"stays behind {_join(behind)} points")
    sentence = f"The trained teacher reaches {ours:.1f}%"
    return f"{sentence}: it {', and '.join(parts)}." if parts else f"{sentence}."


def _mid_sentence(name: str) -> str:
    return {"Raw pixels": "raw pixels", "Colour histogram": "the colour histogram", "Untrained network": "the untrained network"}[name]


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _with_levels(panel: Panel, metrics: dict[str, float]) -> Panel:
    """The k-NN panel, with what the teacher is compared with."""
    if "knn/teacher" not in panel.lines.values():
        return panel
    levels = {name.lower(): value for name, value in _accuracies(metrics).items() if name != KNN_ROWS["knn/teacher"]}
    return replace(panel, levels=levels)


def _figures(panels: Sequence[Panel], records: Sequence[dict]) -> str:
    drawn = [(panel, curves_svg(panel, records)) for panel in panels]
    figures = "".join(
        f'<figure class="card"><h3>{html.escape(panel.title)}</h3><img alt="{html.escape(panel.title)}" src="{data_url(svg, "svg+xml")}">'
        f"<figcaption>{html.escape(panel.caption)}</figcaption></figure>"
        for panel, svg in drawn
        if svg is not None
    )
    return f'<div class="grid">{figures}</div>' if figures else ""


def _crops(png: bytes | None) -> str:
    if png is None:
        return ""
    return (
        f'<figure class="card beside"><div class="scroll"><img class="crops" alt="augmented crops" src="{data_url(png, "png")}"></div>'
        "<figcaption>One row per image. The teacher sees the global crops, the student all of them; what it says of each crop has to "
        "match what the teacher says of the others. Check that a local crop still shows something to recognise, and that colour alone "
        "does not give the image away.</figcaption></figure>"
    )


def _health_table(records: Sequence[dict]) -> str:
    last = next((record for record in reversed(records) if any(metric in record for metric in HEALTH_ROWS)), None)
    if last is None:
        return ""
    cells = "".join(
        f'<tr><th scope="row">{name}</th><td class="number">{number(last[metric])}</td><td>{unit}</td><td class="muted">{healthy}</td></tr>'
        for metric, (name, unit, healthy) in HEALTH_ROWS.items()
        if metric in last
    )
    return (
        '<div class="card scroll"><table><thead><tr><th>Sign</th><th class="number">Last</th><th></th><th>Healthy</th></tr></thead>'
        f'<tbody>{cells}</tbody></table><p class="caption">At step {last["step"]}, from one batch of one process, at the view level. '
        "These signs need no labels; they tell collapse from life, not good from better.</p></div>"
    )
