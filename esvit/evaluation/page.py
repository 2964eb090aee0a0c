"""The frame and the common parts of our pages: one HTML file that opens anywhere and loads nothing from elsewhere.

Style is inline, pictures are base64.
"""

import base64
import html
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_page(
    path: Path, *, kind: str, title: str, facts: dict[str, str], notes: Sequence[str], sections: Sequence[str], style: str = ""
) -> None:
    """One file at `path`, replaced as a whole (a reader never sees half of it).

    kind      what page this is, a few words above the title
    title     name of the run
    facts     label -> text for the head of the page, in order
    notes     sentences a reader has to know first
    sections  HTML, see `section`
    style     rules of this kind of page alone
    """
    page = _PAGE.format(
        kind=html.escape(kind), title=html.escape(title), style=_STYLE + style, facts=_facts(facts), notes=_notes(notes),
        body="".join(sections), icon=_ICON,
    )  # fmt: skip
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def section(title: str, content: str) -> str:
    """A titled part of the page; nothing without content."""
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>" if content else ""


def _facts(facts: dict[str, str]) -> str:
    return "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(text))}</dd></div>" for name, text in facts.items())


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def metrics_table(metrics: dict[str, float]) -> str:
    """Every final metric, folded away."""
    cells = "".join(
        f'<tr><th scope="row"><code>{html.escape(name)}</code></th><td class="number">{number(value)}</td></tr>'
        for name, value in sorted(metrics.items())
    )
    summary = f"{len(metrics)} values, as in metrics.json"
    return f'<details class="card"><summary>{summary}</summary><table>{cells}</table></details>' if cells else ""


def configuration(config: dict) -> str:
    """Every option, folded away; `choices` in it, group -> choice, come first."""
    choices = [f"{group}={choice}" for group, choice in config.get("choices", {}).items()]
    options = _flat({name: value for name, value in config.items() if name != "choices"})
    lines = "\n".join(html.escape(line) for line in [*choices, *options])
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


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where one can do without."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        decimals = 0 if float(value).is_integer() else max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}"
    return f"{value:.3e}"


def data_url(content: bytes, kind: str) -> str:
    """A picture of a type such as "png" inside the page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


_ICON = data_url(
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
<header><div class="page"><p class="kind">{kind}</p><h1>{title}</h1><dl>{facts}</dl></div></header>
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
