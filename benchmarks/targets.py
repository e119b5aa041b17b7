"""What counts as fast enough: a time as long as a reference of the same run allows.

The references of a pass are "floor" (the bytes that must move, at the bandwidth of a copy), "sdpa"
(`scaled_dot_product_attention`) and "plain" (the same call without the option); None is the clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The longest good time is `factor * reference + plus_ms`."""

    reference: str | None
    factor: float = 0.0
    plus_ms: float = 0.0

    def limit_ms(self, references: Mapping[str, float]) -> float | None:
        """None where the reference was not measured."""
        if self.reference is None:
            return self.plus_ms
        reference = references.get(self.reference)
        return None if reference is None else self.factor * reference + self.plus_ms

    def __str__(self) -> str:
        plus = f"{self.plus_ms * 1e3:g} us"
        if self.reference is None:
            return plus
        words = f"{self.factor:.3g} {self.reference}"
        return f"{words} + {plus}" if self.plus_ms else words


def fraction_of_floor(fraction: float) -> Target:
    """At least `fraction` of the speed at which a copy moves the same bytes."""
    return Target("floor", 1 / fraction)


def verdict(target: Target, ms: float, references: Mapping[str, float]) -> dict:
    """The target in words, its limit, and by what fraction `ms` is over it (negative: under)."""
    limit = target.limit_ms(references)
    over = None if limit is None else ms / limit - 1
    return {"target": str(target), "limit_ms": limit, "over": over}
