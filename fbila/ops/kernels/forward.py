"""The forward pass without options, all of it worked out in advance.

For a small input the time goes into Python. A `Forward` is made once for given shapes, strides and
options; what is left of a call are the allocations and the launches on known pointers.
"""

import torch

from .launch import Launch, Starts
from .memory import Axes
from .output import plan_output
from .short import plan_short
from .side import PLAIN_PLAN
from .state import plan_state
from .sums import Rows, plan_sum_splits


class Forward:
    """`library.inference` and `library.forward` of q, k and v like those it was made for."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        feature_map: str,
        normalizer: str,
        factor: float,
        eps: float,
    ) -> None:
        """q, k, v and o are examples."""
        axes_q, axes_k, axes_v, axes_o = (Axes(x.shape, x.stride()) for x in (q, k, v, o))
        self.normalize = normalizer != "none"
        state, _, shape, self.dtype = plan_state(
            axes_k, axes_v, PLAIN_PLAN, k.dtype, feature_map, True
        )
        output = plan_output(
            axes_q, axes_o, PLAIN_PLAN, q.shape[1] // k.shape[1], q.dtype, feature_map,
            self.normalize, normalizer == "mean", factor, eps,
        )  # fmt: skip
        B, H, splits, size = shape
        self.launches: list[Launch] = [state, output]
        if splits > 1:
            sums = plan_sum_splits(B * H, splits, Rows(size, size, size), self.dtype)
            self.launches.insert(1, sums)
        self.partial = B * H * splits * size if splits > 1 else 0
        self.state = (B * H, size)
        self.inverse = q.shape[:3] if self.normalize else (0,)
        self.shape, self.stride = o.shape, o.stride()
        self.starts = {kept: Starts(self.launches, self._presence(kept)) for kept in (False, True)}

    def _presence(self, kept: bool) -> list[list[bool]]:
        """Which tensors of each launch are there."""
        nothing = [False] * 7
        presence = [[True, True, *nothing, True], [True, True]]
        presence.append([True, True, True, kept and self.normalize, False, *nothing])
        return presence if self.partial else [presence[0], presence[2]]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """o, the state, and 1 / denominator where it is `kept`.

        None where the general way is to be taken: for a first call, or pointers that are no
        multiples of 16 bytes.
        """
        p_q, p_k, p_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        starts = self.starts[kept].of(q.get_device(), p_q | p_k | p_v)
        if starts is None:
            return None
        o = torch.empty_strided(self.shape, self.stride, dtype=q.dtype, device=q.device)
        state = q.new_empty(self.state, dtype=self.dtype)
        inverse = q.new_empty(self.inverse, dtype=self.dtype) if kept else None
        p_inverse = inverse.data_ptr() if kept and self.normalize else None
        p_state = state.data_ptr()
        if self.partial:
            partial = q.new_empty(self.partial, dtype=self.dtype)
            p_partial = partial.data_ptr()
            starts[0](p_k, p_v, *[None] * 7, p_partial)
            starts[1](p_partial, p_state)
        else:
            starts[0](p_k, p_v, *[None] * 7, p_state)
        starts[-1](p_q, p_state, o.data_ptr(), p_inverse, *[None] * 8)
        return o, state, inverse


class ShortForward:
    """`Forward` where one kernel does it all; see `short.serves`."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        feature_map: str,
        normalizer: str,
        factor: float,
        eps: float,
    ) -> None:
        self.normalize = normalizer != "none"
        axes = (Axes(x.shape, x.stride()) for x in (q, k, v, o))
        launch = plan_short(*axes, q.dtype, feature_map, self.normalize, factor, eps)
        self.shape, self.stride = o.shape, o.stride()
        K, V = q.shape[3], v.shape[3]
        self.state = (q.shape[0] * q.shape[1], K * V + K)
        self.inverse = q.shape[:3] if self.normalize else (0,)
        self.starts = {
            kept: Starts([launch], [[*[True] * 4, kept, kept and self.normalize, False, False]])
            for kept in (False, True)
        }

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
        """As that of `Forward`; the state too is only there where it is `kept`."""
        p_q, p_k, p_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        starts = self.starts[kept].of(q.get_device(), p_q | p_k | p_v)
        if starts is None:
            return None
        o = torch.empty_strided(self.shape, self.stride, dtype=q.dtype, device=q.device)
        if not kept:
            starts[0](p_q, p_k, p_v, o.data_ptr(), *[None] * 4)
            return o, None, None
        state = q.new_empty(self.state, dtype=torch.float32)
        inverse = q.new_empty(self.inverse, dtype=torch.float32)
        p_inverse = inverse.data_ptr() if self.normalize else None
        starts[0](p_q, p_k, p_v, o.data_ptr(), state.data_ptr(), p_inverse, None, None)
        return o, state, inverse
