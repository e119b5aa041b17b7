"""A module of another class over the very parameters, children and hooks of one in a model.

What happens to one of the two happens to the other: moving, casting, training, a LoRA put around a
projection, a hook. So nothing has to go over when they change places.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from .report import AdapterError

M = TypeVar("M", bound=nn.Module)


def over(original: nn.Module, kind: type[M], **attributes: Any) -> M:
    """A module of class `kind` that shares what `original` holds, with further attributes."""
    twin = kind.__new__(kind)
    vars(twin).update(vars(original), **attributes)
    return twin


def replacements(
    model: nn.Module, names: Iterable[str], make: Callable[[str, nn.Module], nn.Module]
) -> dict[str, nn.Module]:
    """`make(name, module)` for each of the modules; one that is in several places gets one."""
    made: dict[int, nn.Module] = {}
    modules = {}
    for name in names:
        original = model.get_submodule(name)
        if id(original) not in made:
            made[id(original)] = make(name, original)
        modules[name] = made[id(original)]
    return modules


def share(one: nn.Module, other: nn.Module) -> bool:
    """Whether the two hold their parameters and children in common."""
    return vars(one)["_modules"] is vars(other)["_modules"]


def keep_up(leaving: nn.Module, coming: nn.Module) -> None:
    """Gives `coming` what `leaving` was told since they changed places: mode, processor, and so on.

    What only one of the two has is its own. Children, which both hold, are not gone into.
    """
    state = vars(coming)
    state.update({name: value for name, value in vars(leaving).items() if name in state})


def own_forward(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward, not one that somebody put on it."""
    return "forward" not in vars(module)


def why_not_replaced(name: str, module: nn.Module) -> str:
    """Why no other module can take the place of this one, whatever it computes; `""` if one can.

    What is compiled by itself calls its own forward, and so would a module that shares its state.
    """
    if not name:
        return "is the model itself, and nothing around it could hold another module"
    if not own_forward(module):
        return "had its forward replaced, as accelerate's hooks do, which would be lost"
    if vars(module).get("_compiled_call_impl") is not None:
        return "was compiled by itself; compile it afterwards"
    return ""


def require_own_forward(name: str, module: nn.Module) -> None:
    """Refuses a module that a hook of another library would be lost with.

    Raises:
        AdapterError: If its forward was replaced.
    """
    if not own_forward(module):
        raise AdapterError(
            f"The forward of {name} was replaced, as accelerate's hooks do, and a module in its "
            "place would not have that. Remove it first, and put it on again afterwards."
        )
