"""Which modules of a model are meant: by name, by pattern, by what they are, by number.

As in peft, a string is a regular expression for the whole name, and a list holds names or their
ends.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from .report import AdapterError

Selector = str | re.Pattern[str] | Sequence[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Selection:
    """The filters of a swap.

    Attributes:
        include, exclude: None, or a `Selector` of names.
        layers: Numbers of modules among those that are left, negative ones from the end; or None.
    """

    include: Selector | None = None
    exclude: Selector | None = None
    layers: Sequence[int] | None = None

    def why_not(self, name: str, module: nn.Module) -> str:
        """Why the names leave a module out; `""` if they do not."""
        if self.include is not None and not _matches(self.include, name, module):
            return f"does not match include={_words(self.include)}"
        if self.exclude is not None and _matches(self.exclude, name, module):
            return f"matches exclude={_words(self.exclude)}"
        return ""

    def numbers(self, count: int) -> set[int]:
        """Which of `count` modules `layers` leaves.

        Raises:
            AdapterError: If there are not as many.
        """
        if self.layers is None:
            return set(range(count))
        absent = [n for n in self.layers if not -count <= n < count]
        if absent:
            raise AdapterError(
                f"layers={list(self.layers)} asks for {absent}, but {count} modules are left to "
                "choose from."
            )
        return {n % count for n in self.layers}


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    if isinstance(selector, str | re.Pattern):
        return re.fullmatch(selector, name) is not None
    if callable(selector):
        return bool(selector(name, module))
    return any(name == end or name.endswith(f".{end}") for end in selector)


def _words(selector: Selector) -> str:
    if isinstance(selector, re.Pattern):
        return repr(selector.pattern)
    if callable(selector):
        return getattr(selector, "__name__", type(selector).__name__)
    return repr(selector)
