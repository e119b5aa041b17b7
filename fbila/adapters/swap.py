"""The reversible replacement of modules that every adapter is built on.

The handle and the originals hang on the model outside its module tree: state dicts, `.to()` and
hooks see the model as it is now, while a deep copy of the model gets a handle of its own.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .carry import carry, require_carriable
from .drift import beside
from .hooks import hooked, offloading_put_on_again, placement
from .lora import has_tuner
from .processors import carry_processor
from .report import AdapterError, LayerDrift, SwapReport
from .shared import keep_up, require_own_forward, share

_HANDLE = "_fbila_handle"
# Where originals wait: where they were, in the memory of the CPU, or nowhere.
KEPT = ("device", "cpu", "none")
_PARKING = torch.device("cpu")


class SwapHandle:
    """The replacement of some modules of one model; made by `swap_modules`.

    As a context manager it is undone at the end of the block.

    Attributes:
        model: The model.
        originals: Path -> the module that the model came with.
        modules: Path -> the module that takes its place.
        report: What was swapped and skipped.
        mounted: Whether the new modules are in the model at this moment.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        report: SwapReport,
        settings: Mapping[str, Any],
        keep_original: str = "device",
    ) -> None:
        self.model = model
        self.keep_original = keep_original
        self.originals = {name: model.get_submodule(name) for name in modules}
        self.modules = dict(modules)
        self.report = report
        self.mounted = False
        both = (*self.originals.values(), *self.modules.values())
        self._placed = {module: placement(module) for module in both}
        self._own_dtype = self._find_own_dtype()
        # Path -> the value that the attribute there has in the other state.
        self._settings = dict(settings)

    def __enter__(self) -> "SwapHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.unmount()

    def unmount(self) -> SwapReport:
        """Puts every original back: the same objects, with the weights they had.

        Raises:
            AdapterError: If somebody else has replaced one of the modules since, or the originals
                were not kept.
        """
        if self.mounted:
            self._put_back()
        if self.attached:
            delattr(self.model, _HANDLE)
            vars(self.model).pop("save_pretrained", None)
        return self.report

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Runs the block with the originals in place."""
        if not self.mounted:
            yield
            return
        self._put_back()
        try:
            yield
        finally:
            if self.attached:  # and not unmounted for good inside the block
                self._put_in()

    def check(self, *args: Any, **kwargs: Any) -> list[LayerDrift]:
        """How far each new module's answer is from the original's, given the same inputs.

        Runs the model once, with the originals in place, and each new module beside its original.

        Args:
            *args, **kwargs: What the model is called with.

        Returns:
            One entry a module, in the order in which they ran.
        """
        with self.disabled(), beside(self.originals, self.modules) as drifts, torch.no_grad():
            self.model(*args, **kwargs)
        return drifts

    def new_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the new modules have and the originals have not: what to train.

        Where the new modules compute with the originals' own, there are none.
        """
        old = {id(p) for module in self.originals.values() for p in module.parameters()}
        new = {id(p): p for module in self.modules.values() for p in module.parameters()}
        yield from (p for key, p in new.items() if key not in old)

    @property
    def attached(self) -> bool:
        """Whether the model still carries this swap, mounted or disabled."""
        return get_handle(self.model) is self

    def _mount(self) -> None:
        self._put_in()
        setattr(self.model, _HANDLE, self)
        if hasattr(self.model, "save_pretrained"):
            model: Any = self.model
            guard: Any = functools.partial(_save_without_swap, model)
            # Callers look at which arguments are accepted before they pass them on.
            guard.__signature__ = inspect.signature(model.save_pretrained)
            model.save_pretrained = guard

    def _put_in(self) -> None:
        self._exchange(self.originals, self.modules)
        self.mounted = True
        if self.keep_original == "cpu":
            self._park_originals()
        elif self.keep_original == "none":
            self.originals = {}
            self._placed = {module: self._placed[module] for module in self.modules.values()}

    def _put_back(self) -> None:
        if self.keep_original == "none":
            raise AdapterError(
                'The originals were not kept (keep_original="none"). Reload the '
                f"{type(self.model).__name__} to get softmax attention back."
            )
        try:
            if self.keep_original == "cpu":
                for name, original in self.originals.items():
                    self._move(original, placement(self.modules[name])[0])
            self._exchange(self.modules, self.originals)
        except Exception:
            # Also where the device has no room for them.
            if self.keep_original == "cpu":
                self._park_originals()
            raise
        self.mounted = False

    def _park_originals(self) -> None:
        for original in self.originals.values():
            self._move(original, _PARKING)

    def _move(self, module: nn.Module, device: torch.device) -> None:
        module.to(device)
        self._placed[module] = placement(module)

    def _exchange(self, leaving: Mapping[str, nn.Module], coming: Mapping[str, nn.Module]) -> None:
        # A block that was pruned meanwhile took its module along.
        leaving = {name: module for name, module in leaving.items() if _has(self.model, name)}
        for name, module in leaving.items():
            found = self.model.get_submodule(name)
            if found is not module:
                kind = type(found).__name__
                raise AdapterError(
                    f"{name} is now a {kind}, not the module fbila mounted; it was left as it is. "
                    f"Undo {kind} first."
                )
        self._replace(leaving, coming)
        for path, value in self._settings.items():
            owner, _, attribute = path.rpartition(".")
            holder = self.model.get_submodule(owner)
            self._settings[path] = getattr(holder, attribute)
            setattr(holder, attribute, value)

    def _replace(self, leaving: Mapping[str, nn.Module], coming: Mapping[str, nn.Module]) -> None:
        """Each module of `leaving`, which is in the model, by that of `coming`; all or none."""
        if all(share(module, coming[name]) for name, module in leaving.items()):
            for name, module in leaving.items():
                require_own_forward(name, module)
            for name, module in leaving.items():
                keep_up(module, coming[name])
                self._take_place(name, module, coming[name])
            return
        if self._untouched():
            for name, module in leaving.items():
                carry_processor(module, coming[name])
                self._take_place(name, module, coming[name])
            return
        for name, module in leaving.items():
            require_carriable(name, module)
            require_carriable(name, coming[name])
        own_dtype = self._find_own_dtype()
        with offloading_put_on_again(self.model):
            for name, module in leaving.items():
                # Whatever moved the model meanwhile could not see the module that was outside it.
                device, dtype = placement(module)
                moved = device != self._placed[module][0]
                # But the new modules alone may have been cast, as to float32 to be trained.
                alone = own_dtype is not None and own_dtype == self._own_dtype
                cast = dtype != self._placed[module][1] and not alone
                coming[name].to(device if moved else None, dtype if cast else None)
                carry(module, coming[name])
                for either in (module, coming[name]):
                    self._placed[either] = placement(either)
                self._take_place(name, module, coming[name])
        self._own_dtype = own_dtype

    def _find_own_dtype(self) -> torch.dtype | None:
        """Of the first parameter of the model that is in none of the modules."""
        inside = {id(p) for module in self._placed for p in module.parameters()}
        return next((p.dtype for p in self.model.parameters() if id(p) not in inside), None)

    def _untouched(self) -> bool:
        """Whether nothing has been put on the modules, and none has been moved, on either side.

        Found out quickly: `disabled()` is for every step of a training, whose teacher runs in it.
        """
        if hooked(self.model, "_diffusers_hook"):
            return False
        for module, placed in self._placed.items():
            if hooked(module, "_hf_hook") or has_tuner(module):
                return False
            parameter = next(module.parameters())
            if (parameter.device, parameter.dtype) != placed:
                return False
        return True

    def _take_place(self, name: str, leaving: nn.Module, coming: nn.Module) -> None:
        if coming.training != leaving.training:
            coming.train(leaving.training)
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, coming)


def swap_modules(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    report: SwapReport,
    settings: Mapping[str, Any] | None = None,
    keep_original: str = "device",
) -> SwapHandle:
    """Puts new modules in the place of a model's own, reversibly.

    The caller has checked that the modules fit. While they are mounted, `model.save_pretrained`
    writes the model as it was, so that what is saved can be loaded without fbila.

    Args:
        model: The model.
        modules: Path of a module of the model -> what takes its place.
        report: Kept on the handle.
        settings: Path of an attribute in the model -> its value while they are mounted.
        keep_original: One of `KEPT`; but for "device" the new modules have weights of their own.

    Raises:
        AdapterError: If the model carries a swap already; it has to be undone first.
    """
    if get_handle(model) is not None:
        raise AdapterError(
            f"{type(model).__name__} carries a swap already. Undo it first: "
            "fbila.adapters.unswap(model)."
        )
    handle = SwapHandle(model, modules, report, settings or {}, keep_original)
    handle._mount()
    return handle


def get_handle(model: nn.Module) -> SwapHandle | None:
    """The handle of the swap that a model carries, if any."""
    return vars(unwrap(model)).get(_HANDLE)


def unswap(model: nn.Module) -> SwapReport:
    """Undoes the swap that a model carries, also when nobody holds its handle any more.

    Raises:
        AdapterError: If it carries none, or somebody else has replaced one of its modules since.
    """
    handle = get_handle(model)
    if handle is None:
        raise AdapterError(f"{type(model).__name__} carries no swap, there is nothing to undo.")
    return handle.unmount()


def unwrap(model: nn.Module) -> nn.Module:
    """The module behind `torch.compile`."""
    return getattr(model, "_orig_mod", model)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _save_without_swap(model: Any, *args: Any, **kwargs: Any) -> Any:
    handle = get_handle(model)
    assert handle is not None
    with handle.disabled():
        return type(model).save_pretrained(model, *args, **kwargs)
