"""Names and numbers of classes in text files, and labels that contradict each other.

Letters: n labelled things.
"""

import os
from dataclasses import dataclass

import numpy as np

from esvit.errors import OptionError


def numbered_names(path: str, *, option: str) -> dict[str, int]:
    """Number by name, from lines `<name><tab><number>`. Raises OptionError with file and line for a malformed or contradictory one."""
    numbers: dict[str, int] = {}
    names: dict[int, str] = {}
    for place, line in _lines(path, option):
        name, tab, number = line.partition("\t")
        if not tab or not number.strip().isdecimal():
            raise OptionError(option, f"{path} line {place} is malformed: '{line.strip()[:80]}'", "write '<name><tab><number>'")
        value = int(number)
        if name in numbers:
            raise OptionError(option, f"{path} line {place} gives '{name}' a number again", "give each name one number")
        if value in names:
            raise OptionError(option, f"{path} line {place} gives '{name}' the number of '{names[value]}'", "give each number one name")
        numbers[name], names[value] = value, name
    if not numbers:
        raise OptionError(option, f"'{path}' holds no names", "write '<name><tab><number>', one a line")
    return numbers


def listed_names(path: str, *, option: str) -> dict[str, int]:
    """Number by name, from one name a line, numbered from 0. Raises OptionError with file and line for a name that comes twice."""
    numbers: dict[str, int] = {}
    for place, line in _lines(path, option):
        name = line.strip()
        if name in numbers:
            raise OptionError(option, f"{path} line {place} names '{name}' again", "name each class once")
        numbers[name] = len(numbers)
    if not numbers:
        raise OptionError(option, f"'{path}' holds no names", "write one name a line")
    return numbers


def _lines(path: str, option: str) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    if not os.path.isfile(path):
        raise OptionError(option, f"file '{path}' does not exist", "give the name of a file in data.root")
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        return [(number, line.rstrip("\r\n")) for number, line in enumerate(lines, start=1) if line.strip()]


@dataclass(frozen=True)
class Conflict:
    """Places of two things of one key and different labels."""

    earlier: int
    later: int


def first_conflict(keys: np.ndarray, labels: np.ndarray) -> Conflict | None:
    """The first thing whose label differs from that of an earlier one of the same key. keys, labels  (n,) int64"""
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    places = np.flatnonzero(same & (labels[order[1:]] != labels[order[:-1]]))
    if not len(places):
        return None
    first = places[np.argmin(order[places + 1])]
    return Conflict(int(order[first]), int(order[first + 1]))
