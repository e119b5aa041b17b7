"""Triton's interpreter in half the time.

It replaces all of triton.language when a kernel starts, and again whenever the kernel calls a
function of its own. The second time changes nothing in a module that has been seen.
"""

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


def once_a_launch(patch: Callable) -> Callable:
    """`patch(function)`, which is skipped for a module that a launch under way has patched."""
    patched: set[int] = set()

    def patch_lang(function: Callable) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        scope = patch(function)
        if not patched:
            # The kernel itself, whose end takes it all back.
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(module)
        return scope

    return patch_lang


def hasten() -> None:
    # An older Triton never takes it back, and returns nothing to tell the end of a launch by.
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = once_a_launch(interpreter._patch_lang)
