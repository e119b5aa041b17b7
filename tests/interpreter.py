"""Triton's interpreter in a fraction of the time.

It replaces all of triton.language when a kernel starts, and again whenever the kernel calls a
function of its own. The second time changes nothing in a module that has been seen. It finds out
whether sums of int32 overflow, and tells only where `debug` is on. And what follows from a type it
works out for every tensor anew.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import triton.language as tl
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


def once_a_type(function: Callable) -> Callable:
    """`function(type)`, which is the same for types of one name."""
    found: dict[str, Any] = {}

    def of_type(dtype: tl.dtype) -> Any:
        if dtype.name not in found:
            found[dtype.name] = function(dtype)
        return found[dtype.name]

    return of_type


def once_a_shape(init: Callable) -> Callable:
    """`block_type.__init__`, of which all but the elements is that of a block seen before."""
    found: dict[tuple, dict[str, Any]] = {}

    def of_block(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        key = (element_ty.name, *(getattr(side, "value", side) for side in shape))
        if not all(type(side) is int for side in key[1:]):
            init(self, element_ty, shape)
            return
        if key not in found:
            init(self, element_ty, shape)
            found[key] = {k: x for k, x in vars(self).items() if k != "element_ty"}
        self.__dict__.update(found[key], element_ty=element_ty)

    return of_block


def once_a_kind(init: Callable) -> Callable:
    """`tensor.__init__`, of which all but the numbers is that of a tensor of the same type."""
    found: dict[str, dict[str, Any]] = {}

    def of_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        if type.name not in found:
            init(self, handle, type)
            own = ("handle", "type", "dtype")
            found[type.name] = {k: x for k, x in vars(self).items() if k not in own}
        self.__dict__.update(found[type.name], handle=handle, type=type, dtype=type.scalar)

    return of_tensor


def unless_alike(broadcast: Callable) -> Callable:
    """`broadcast_impl_value`, which leaves two tensors of one shape as they are."""

    def of_two(self: Any, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        x, y = lhs.type, rhs.type
        if x.is_block() and y.is_block():
            alike = [*x.shape] == [*y.shape]
        else:
            alike = x.is_block() == y.is_block()
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    return of_two


def unless_equal(check: Callable) -> Callable:
    """`binary_op_type_checking_impl`, which leaves two tensors of one type as they are."""

    def of_two(self: Any, lhs: Any, rhs: Any, *how: bool, **named: bool) -> tuple:
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            same = lhs.type.name == rhs.type.name
            # Others are computed wider.
            if same and lhs.dtype.name in ("fp32", "fp64", "int32", "int64"):
                return lhs, rhs
        return check(self, lhs, rhs, *how, **named)

    return of_two


def once_a_pair(promote: Callable) -> Callable:
    """`computation_type_impl`, which is the same for types of the same names."""
    found: dict[tuple, tl.dtype] = {}

    def of_two(self: Any, x: tl.dtype, x_scalar: bool, y: tl.dtype, *how: bool) -> tl.dtype:
        key = (x.name, x_scalar, y.name, *how)
        if key not in found:
            found[key] = promote(self, x, x_scalar, y, *how)
        return found[key]

    return of_two


def hasten() -> None:
    # An older Triton never takes it back, and returns nothing to tell the end of a launch by.
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = once_a_launch(interpreter._patch_lang)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = once_a_type(interpreter._get_np_dtype)
    tl.block_type.__init__ = once_a_shape(tl.block_type.__init__)
    tl.tensor.__init__ = once_a_kind(tl.tensor.__init__)
    if hasattr(interpreter, "TritonSemantic"):
        semantic = interpreter.TritonSemantic
        semantic.broadcast_impl_value = unless_alike(semantic.broadcast_impl_value)
        semantic.binary_op_type_checking_impl = unless_equal(semantic.binary_op_type_checking_impl)
        semantic.computation_type_impl = once_a_pair(semantic.computation_type_impl)
