"""What a search may choose from, in plain data."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One option: `choices` as typed, or numbers from `low` to `high`, both included.

    step            between whole numbers
    is_whole        whole numbers only
    is_logarithmic  equal ratios count alike
    """

    name: str
    choices: Sequence[str] = ()
    low: float = 0
    high: float = 0
    step: int = 1
    is_whole: bool = False
    is_logarithmic: bool = False

    def first(self) -> str:
        """One of its values, as typed."""
        return self.choices[0] if self.choices else str(self.low)
