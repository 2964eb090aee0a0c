"""The page that a run leaves behind: what it reached, how it went and with what options, in one file that opens anywhere.

Nothing is loaded from elsewhere: style is inline, pictures are base64. Whatever a run did not log is left out.
"""

import base64
import html
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from esvit.evaluation.figures import Panel, curves_svg

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
        _section("Result", _knn_table(metrics)),
        _section("Learning", _figures([_with_levels(panel, metrics) for panel in LEARNING], records)),
        _section("What the network sees", _crops(picture)),
        _section("Health, without labels", _figures(HEALTH, records) + _health_table(records)),
        _section("Schedules and speed", _figures(COURSE, records)),
        _section("Final metrics", _metrics_table(metrics)),
        _section("Configuration", _configuration(config)),
    ]
    page = _PAGE.format(
        title=html.escape(title), style=_STYLE, facts=_facts(facts), notes=_notes(notes), body="".join(sections), icon=_ICON
    )  # fmt: skip
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>" if content else ""


def _facts(facts: dict[str, str]) -> str:
    return "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(text))}</dd></div>" for name, text in facts.items())


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


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
        f'<figure class="card"><h3>{html.escape(panel.title)}</h3><img alt="{html.escape(panel.title)}" src="{_data_url(svg, "svg+xml")}">'
        f"<figcaption>{html.escape(panel.caption)}</figcaption></figure>"
        for panel, svg in drawn
        if svg is not None
    )
    return f'<div class="grid">{figures}</div>' if figures else ""


def _crops(png: bytes | None) -> str:
    if png is None:
        return ""
    return (
        f'<figure class="card beside"><div class="scroll"><img class="crops" alt="augmented crops" src="{_data_url(png, "png")}"></div>'
        "<figcaption>One row per image. The teacher sees the global crops, the student all of them; what it says of each crop has to "
        "match what the teacher says of the others. Check that a local crop still shows something to recognise, and that colour alone "
        "does not give the image away.</figcaption></figure>"
    )


def _health_table(records: Sequence[dict]) -> str:
    last = next((record for record in reversed(records) if any(metric in record for metric in HEALTH_ROWS)), None)
    if last is None:
        return ""
    cells = "".join(
        f'<tr><th scope="row">{name}</th><td class="number">{_number(last[metric])}</td><td>{unit}</td>'
        f'<td class="muted">{healthy}</td></tr>'
        for metric, (name, unit, healthy) in HEALTH_ROWS.items()
        if metric in last
    )
    return (
        '<div class="card scroll"><table><thead><tr><th>Sign</th><th class="number">Last</th><th></th><th>Healthy</th></tr></thead>'
        f'<tbody>{cells}</tbody></table><p class="caption">At step {last["step"]}, from one batch of one process, at the view level. '
        "These signs need no labels; they tell collapse from life, not good from better.</p></div>"
    )


def _metrics_table(metrics: dict[str, float]) -> str:
    cells = "".join(
        f'<tr><th scope="row"><code>{html.escape(name)}</code></th><td class="number">{_number(value)}</td></tr>'
        for name, value in sorted(metrics.items())
    )
    summary = f"{len(metrics)} values, as in metrics.json"
    return f'<details class="card"><summary>{summary}</summary><table>{cells}</table></details>' if cells else ""


def _configuration(config: dict) -> str:
    lines = "\n".join(html.escape(line) for line in _flat(config))
    summary = "Every option of this run, as it would be typed on the command line"
    return f'<details class="card"><summary>{summary}</summary><pre>{lines}</pre></details>'


def _flat(config: dict, prefix: str = "") -> list[str]:
    """`a.b=1` for every leaf of nested dicts; keys that begin with an underscore are not the user's."""
    lines = []
    for name, value in config.items():
        if isinstance(value, dict) and value:
            lines += _flat(value, f"{prefix}{name}.")
        elif not str(name).startswith("_"):
            lines.append(f"{prefix}{name}={_typed(value)}")
    return lines


def _typed(value: Any) -> str:
    """A value as Hydra reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(_typed(each) for each in value)}]"
    return str(value)


def _number(value: float | None) -> str:
    """Four significant digits, without an exponent where one can do without."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        decimals = 0 if float(value).is_integer() else max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}"
    return f"{value:.3e}"


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


_ICON = _data_url(
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="10" height="10" x="1" y="1" rx="2" fill="#1f6fb2"/>'
    b'<rect width="7" height="7" x="8" y="8" rx="2" fill="#d9772b"/></svg>',
    "svg+xml",
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="{icon}">
<style>{style}</style>
</head>
<body>
<header><div class="page"><p class="kind">EsViT pre-training report</p><h1>{title}</h1><dl>{facts}</dl></div></header>
<main class="page">{notes}{body}</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --muted: #616e7c; --line: #e4e8ec; --paper: #f5f7f9; --blue: #1f6fb2; --quiet: #b6c2ce; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.page { max-width: 1080px; margin: 0 auto; padding: 0 20px; }
header { background: #14324d; color: white; padding: 34px 0 26px; }
header .kind { margin: 0; color: #a9c4dc; font-size: 14px; letter-spacing: .04em; }
h1 { margin: 2px 0 18px; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 14px; font-size: 22px; }
h3 { margin: 0 0 8px; font-size: 16px; }
dl { display: flex; flex-wrap: wrap; gap: 12px 32px; margin: 0; }
dt { color: #a9c4dc; font-size: 13px; }
dd { margin: 0; font-size: 15px; overflow-wrap: anywhere; }
main { padding-bottom: 60px; }
.card { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 0; }
.card + .card, .grid + .card { margin-top: 16px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px; }
.grid img { display: block; width: 100%; height: auto; max-width: 640px; }
.grid .card { margin: 0; }
.scroll { overflow-x: auto; }
.beside { display: flex; flex-wrap: wrap; gap: 8px 28px; }
.beside .scroll { max-width: 100%; }
.beside figcaption { flex: 1 1 260px; }
.crops { display: block; max-width: 100%; min-width: min(560px, 100%); height: auto; }
figcaption, .caption { margin: 12px 0 0; color: var(--muted); font-size: 14px; line-height: 1.5; max-width: 75ch; }
.verdict { margin: 0 0 14px; font-size: 18px; max-width: 60ch; }
.note { margin: 24px 0 -8px; padding: 12px 16px; background: #fff6e5; border: 1px solid #f0d9a8; border-radius: 10px; }
.note + .note { margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th { text-align: left; font-weight: 500; }
thead th { color: var(--muted); font-size: 13px; border-bottom: 1px solid var(--line); }
th, td { padding: 7px 14px 7px 0; vertical-align: middle; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.muted { color: var(--muted); }
.bars th { white-space: nowrap; width: 1%; }
.bars .bar { width: 99%; }
.bars .bar span { display: block; height: 20px; border-radius: 4px; background: var(--quiet); min-width: 2px; }
.bars .ours .bar span { background: var(--blue); }
.bars .ours th, .bars .ours .number { font-weight: 700; }
summary { cursor: pointer; font-weight: 500; }
details table { margin-top: 12px; width: auto; min-width: min(100%, 460px); }
pre { margin: 14px 0 0; overflow-x: auto; font-size: 13px; line-height: 1.5; }
@media (max-width: 560px) { h1 { font-size: 25px; } .card { padding: 14px; } th, td { padding-right: 10px; } }
@media print { body { background: white; } .card { break-inside: avoid; } }
"""
