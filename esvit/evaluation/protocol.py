"""How a number came about, pinned beside it: two results compare only when their protocols are equal. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esvit.run_folder import flatten, write_atomically
from esvit.tracking.environment import source_state

PROTOCOL_NAME = "protocol.json"
_IDENTITY = ("frozen.weights", "frozen.step", "commit")  # what was measured, and by which code: these differ between comparable results
_CHOSEN = "chosen."  # what a sweep found to be best is a part of its result


def write_protocol(folder: Path, protocol: Mapping[str, Any]) -> Path:
    """Write `protocol` (nested, plain values) and the code's commit into `folder`; returns the file."""
    source = source_state(Path(__file__))
    commit = f"{source.commit}{' and changes' if source.dirty else ''}" if source else "unknown"
    path = folder / PROTOCOL_NAME
    write_atomically(path, json.dumps({**protocol, "commit": commit}, indent=1) + "\n")
    return path


def read_protocol(folder: Path) -> dict[str, Any] | None:
    """The protocol of the result in `folder`, None if it has none."""
    path = folder / PROTOCOL_NAME
    return json.loads(path.read_text()) if path.exists() else None


def protocol_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted option -> both values, for everything that keeps two results from being compared; weights, commit and choices do not."""
    one, other = flatten(dict(ours)), flatten(dict(theirs))
    names = [name for name in sorted(one | other) if name not in _IDENTITY and not name.startswith(_CHOSEN)]
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}
