"""What counts as good enough: a time or peak memory, beside that of a reference in the same row."""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
# By quantity: the words, the unit, and what makes one of it.
WORDS = {"ms": ("time", "ms", 1), "peak_bytes": ("peak memory", "GiB", GIB)}


@dataclass(frozen=True)
class Goal:
    """The largest good value is `factor * reference + plus`.

    Attributes:
        attention: Whose value is judged.
        reference: Whose value it is compared with; None: with nothing.
        quantity: "ms" or "peak_bytes".
    """

    attention: str
    reference: str | None
    factor: float = 0.0
    plus: float = 0.0
    quantity: str = "ms"

    def verdict(self, outcomes: Mapping[str, Mapping]) -> dict:
        """The goal in words, its limit, the value, and by what fraction that is over the limit.

        Limit, value and `over` are None where they were not measured.
        """
        value = self._value(outcomes, self.attention)
        base = 0.0 if self.reference is None else self._value(outcomes, self.reference)
        limit = None if base is None else self.factor * base + self.plus
        over = value / limit - 1 if value is not None and limit else None
        return {
            "goal": str(self),
            "quantity": self.quantity,
            "limit": limit,
            "value": value,
            "over": over,
        }

    def _value(self, outcomes: Mapping[str, Mapping], name: str) -> float | None:
        return outcomes.get(name, {}).get(self.quantity)

    def __str__(self) -> str:
        what, unit, scale = WORDS[self.quantity]
        amount = f"{self.factor:.2f} of {self.reference}'s"
        if self.reference is None:
            amount = f"{self.plus / scale:g} {unit}"
        return f"{what} of {self.attention} at most {amount}"
