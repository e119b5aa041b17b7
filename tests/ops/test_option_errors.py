"""Options that do not fit raise before anything runs."""

import re

import pytest
import torch
from helpers import DEVICE
from helpers import zeros as x

from fbila import Rotary, linear_attn, simple_la

Q, K, V = x(2, 3, 5, 4), x(2, 3, 7, 4), x(2, 3, 7, 6)
K_Q, V_Q = K[:, :, :5], V[:, :, :5]  # with the length of q
COS, LEARNED = x(5, 2), x(5, 2).requires_grad_()
MASK = x(2, 7) == 0
P, ENDS = x(5, 3, 4), torch.tensor([0, 5], device=DEVICE)  # packed

CASES = [
    # rotary
    ((Q, K_Q, V_Q), {"rotary": COS}, TypeError, "rotary must be (cos, sin) or fbila.Rotary"),
    ((Q, K_Q, V_Q), {"rotary": (COS, COS, COS)}, TypeError, "interleaved), got tuple of 3"),
    ((Q, K_Q, V_Q), {"rotary": (COS, 0)}, TypeError, "sin must be a torch.Tensor, got int"),
    ((Q, K_Q, V_Q), {"rotary": Rotary(COS, COS, 1)}, TypeError, "must be True or False, got int"),
    ((Q, K_Q, V_Q), {"rotary": (COS.int(), COS)}, TypeError, "cos.dtype=torch.int32 is not supp"),
    ((Q, K_Q, V_Q), {"rotary": (COS, COS.to("meta"))}, ValueError, "on the device of q, got sin."),
    ((Q, K_Q, V_Q), {"rotary": (LEARNED, COS)}, ValueError, "cos.requires_grad is True"),
    ((Q, K_Q, V_Q), {"rotary": (COS, LEARNED)}, ValueError, "sin.requires_grad is True"),
    ((Q, K_Q, V_Q), {"rotary": (COS, COS[:4])}, ValueError, "cos.shape=(5, 2) and sin.shape=(4"),
    ((Q, K_Q, V_Q), {"rotary": (Q, Q)}, ValueError, "=(5, 2) or (heads, tokens, head_dim / 2)="),
    ((Q, K_Q, V_Q), {"rotary": (x(2, 5, 2),) * 2}, ValueError, "got cos.shape=(2, 5, 2)"),
    ((x(1, 1, 5, 3),) * 3, {"rotary": (COS, COS)}, ValueError, "even head_dim, got q.shape[-1]=3"),
    ((Q, K, V), {"rotary": (COS, COS)}, ValueError, "Use linear_attn_state and linear_attn_apply"),
    ((Q, K, V), {"rotary": (COS, COS)}, ValueError, "got q.shape[-2]=5 and k.shape[-2]=7"),
    ((Q, K_Q[:, :1], V_Q[:, :1]), {"rotary": (x(3, 5, 2),) * 2}, ValueError, "3 heads of q and 1"),
    ((Q, K_Q, V_Q), {"rotary": (COS, COS), "feature_map": "signed"}, ValueError, "=(5, 4) or (h"),
    # features
    ((x(1, 1, 5, 129),) * 3, {"feature_map": "signed"}, ValueError, "makes 258 features of head_d"),
    # weights and masks
    ((Q, K, V), {"key_weight": 0.5}, TypeError, "key_weight must be a torch.Tensor, got float"),
    ((Q, K, V), {"key_weight": x(2, 7).bool()}, TypeError, "key_weight.dtype=torch.bool is not s"),
    ((Q, K, V), {"key_weight": x(2, 5)}, ValueError, "(batch, keys)=(2, 7) or (batch, heads of k"),
    ((Q, K, V), {"key_weight": x(2, 1, 7)}, ValueError, "got key_weight.shape=(2, 1, 7)"),
    ((Q, K[:, :1], V[:, :1]), {"key_weight": x(2, 3, 7)}, ValueError, "keys)=(2, 1, 7), got key_"),
    ((Q, K, V), {"key_weight": x(2, 7, device="meta")}, ValueError, "key_weight.device=meta"),
    ((Q, K, V), {"key_mask": [True] * 7}, TypeError, "key_mask must be a torch.Tensor, got list"),
    ((Q, K, V), {"key_mask": x(2, 7)}, TypeError, "must be bool, True where a key is there"),
    ((Q, K, V), {"key_mask": MASK[:1]}, ValueError, "(batch, keys)=(2, 7), got key_mask.shape=(1"),
    ((Q, K, V), {"key_mask": MASK[:, None]}, ValueError, "got key_mask.shape=(2, 1, 7)"),
    ((Q, K, V), {"key_mask": MASK.to("meta")}, ValueError, "key_mask.device=meta"),
    # packed sequences
    ((P, P, P), {}, ValueError, "q must have 4 dimensions (batch, heads, tokens, head_dim)"),
    ((Q, K, V), {"cu_seqlens": ENDS}, ValueError, "With cu_seqlens q must have 3 dimensions (tok"),
    ((P, P, P), {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
    ((P, P, P), {"cu_seqlens": x(3)}, TypeError, "int32 or int64, got cu_seqlens.dtype=torch.floa"),
    ((P, P, P), {"cu_seqlens": ENDS[None]}, ValueError, "got cu_seqlens.shape=(1, 2)"),
    ((P, P, P), {"cu_seqlens": ENDS[:0]}, ValueError, "(sequences + 1,): 0, then the end of each"),
    ((P, P, P), {"cu_seqlens": ENDS.to("meta")}, ValueError, "cu_seqlens.device=meta"),
    ((P, P[:4], P[:4]), {"cu_seqlens": ENDS}, ValueError, "got q.shape[0]=5 and k.shape[0]=4"),
    ((P, P, P[:4]), {"cu_seqlens": ENDS}, ValueError, "got k.shape[0]=5 and v.shape[0]=4"),
    ((P, P[:, :2], P[:, :2]), {"cu_seqlens": ENDS}, ValueError, "q.shape[1]=3 and k.shape[1]=2"),
    ((P, P, P), {"cu_seqlens": ENDS, "key_mask": MASK}, ValueError, "shape (keys)=(5,), got key_m"),
    ((P, P, P), {"cu_seqlens": ENDS, "key_weight": x(2, 5)}, ValueError, "heads of k, keys)=(3, 5"),
    ((P, P, P), {"cu_seqlens": ENDS, "rotary": (x(7, 2),) * 2}, ValueError, "head_dim / 2)=(5, 2)"),
]  # fmt: skip


@pytest.mark.parametrize("args, options, error, message", CASES, ids=[c[3] for c in CASES])
@pytest.mark.parametrize("function", [linear_attn, simple_la])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_both(function, impl, args, options, error, message, launches):
    with pytest.raises(error, match=re.escape(message)):
        function(*args, impl=impl, **options)
    assert launches == []
