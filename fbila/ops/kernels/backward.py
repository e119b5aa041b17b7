"""The backward pass without options, all of it worked out in advance, as in `forward.py`."""

import torch

from ..feature_maps import feature_dim
from .grad_key import plan_grad_key
from .grad_query import plan_grad_query
from .launch import Launch, Starts
from .memory import Axes
from .side import PLAIN_PLAN
from .sums import Rows, plan_sum_splits
from .tiling import Tiling


class Backward:
    """`library.backward` of tensors like those it was made for, whose heads are not `wide`."""

    @staticmethod
    def serves(q: torch.Tensor, v: torch.Tensor, feature_map: str) -> bool:
        K = feature_dim(q.shape[3], feature_map)
        heads = (q.dtype, K, v.shape[3], "none", feature_map)
        return not any(Tiling.of(name, *heads).wide for name in ("grad_query", "grad_key"))

    def __init__(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        feature_map: str,
        normalize: bool,
        factor: float,
    ) -> None:
        """The tensors are examples, gradients those of q, k and v."""
        axes = [Axes(x.shape, x.stride()) for x in (do, q, k, v, *gradients)]
        axes_do, axes_q, axes_k, axes_v, axes_dq, axes_dk, axes_dv = axes
        group = q.shape[1] // k.shape[1]
        query, _, shape, self.dtype = plan_grad_query(
            axes_q, axes_do, axes_dq, PLAIN_PLAN, group, q.dtype, feature_map, normalize, factor
        )
        key = plan_grad_key(
            axes_k, axes_v, axes_dk, axes_dv, PLAIN_PLAN, k.dtype, feature_map, normalize, factor
        )
        B, H, splits, size = shape
        states = B * k.shape[1]
        self.launches: list[Launch] = [query, key]
        self.summed = group * splits > 1
        if self.summed:
            sums = plan_sum_splits(states, group * splits, Rows(size, size, size), self.dtype)
            self.launches.insert(1, sums)
        # The partial sums, and behind them, at a multiple of 16 bytes, the state's gradient.
        before = (B * H * splits * size + 3) // 4 * 4 if self.summed else 0
        self.partial_bytes = before * self.dtype.itemsize
        self.numbers = before + states * size
        self.layouts = [(x.shape, x.stride()) for x in gradients]
        self.normalize = normalize
        nothing = [False] * 7
        presence = [
            [True, True, True, normalize, False, *nothing[:4], True, False, True],
            [True, True],
            [True, True, True, False, *nothing, True, True, False, False],
        ]
        self.starts = Starts(self.launches, presence if self.summed else [presence[0], presence[2]])

    def __call__(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        state: torch.Tensor,
        inverse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """dq, dk and dv; None where the general way is to be taken."""
        p_do, p_q, p_k, p_v = do.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()
        starts = self.starts.of(q.get_device(), p_do | p_q | p_k | p_v)
        if starts is None:
            return None
        dq, dk, dv = (
            torch.empty_strided(*layout, dtype=q.dtype, device=q.device) for layout in self.layouts
        )
        sums = q.new_empty(self.numbers, dtype=self.dtype)
        partial = sums.data_ptr()
        dstate = partial + self.partial_bytes
        p_inverse = inverse.data_ptr() if self.normalize else None
        starts[0](p_q, p_do, state.data_ptr(), p_inverse, *[None] * 5, dq.data_ptr(), None, partial)
        if self.summed:
            starts[1](partial, dstate)
        starts[-1](p_k, p_v, dstate, *[None] * 8, dk.data_ptr(), dv.data_ptr(), None, None)
        return dq, dk, dv
