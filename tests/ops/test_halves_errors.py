"""The halves and focused_la: malformed calls raise before anything runs, with the values."""

import re

import pytest
import torch
from helpers import DEVICE
from helpers import zeros as x

from fbila import State, focused_la, linear_attn_apply, linear_attn_state

Q, K, V = x(2, 3, 5, 4), x(2, 3, 7, 4), x(2, 3, 7, 6)
COS = x(5, 2)
ENDS = torch.tensor([0, 5], device=DEVICE)
INF, NAN = float("inf"), float("nan")
STATE = State(x(2, 3, 4, 6), x(2, 3, 4), x(2))

STATE_CASES = [
    ((K, None), {}, TypeError, "v must be a torch.Tensor, got NoneType"),
    ((K[0], V), {}, ValueError, "k must have 4 dimensions (batch, heads, tokens, head_dim)"),
    ((K, V.half()), {}, TypeError, "k and v must have one dtype, got k.dtype=torch.float32 and v."),
    ((K, V.to("meta")), {}, ValueError, "k and v must be on one device"),
    ((K[:1], V), {}, ValueError, "got k.shape[0]=1 and v.shape[0]=2"),
    ((K[:, :1], V), {}, ValueError, "got k.shape[1]=1 and v.shape[1]=3"),
    ((K[:, :, :5], V), {}, ValueError, "got k.shape[-2]=5 and v.shape[-2]=7"),
    ((K[..., :0], V), {}, ValueError, "must be at least 1, got k.shape[-1]=0"),
    ((x(1, 1, 3, 4), x(1, 1, 3, 300)), {}, ValueError, "got v.shape[-1]=300"),
    ((K, V), {"feature_map": "softmax"}, ValueError, "got 'softmax'"),
    ((K, V), {"rotary": (COS, COS)}, ValueError, "=(7, 2) or (heads, tokens, head_dim / 2)=("),
    ((K, V), {"key_weight": x(2, 5)}, ValueError, "got key_weight.shape=(2, 5)"),
    ((K, V), {"key_mask": x(2, 7)}, TypeError, "got key_mask.dtype=torch.float32"),
    ((K, V), {"impl": "cuda"}, ValueError, "'triton' or 'reference', got 'cuda'"),
    ((K, V), {"cu_seqlens": ENDS}, TypeError, "unexpected keyword argument 'cu_seqlens'"),
]  # fmt: skip

APPLY_CASES = [
    ((None, STATE), {}, TypeError, "q must be a torch.Tensor, got NoneType"),
    ((Q[0], STATE), {}, ValueError, "q must have 4 dimensions"),
    ((Q, tuple(STATE)), {}, TypeError, "state must be a fbila.State, got tuple"),
    ((Q, STATE._replace(count=7)), {}, TypeError, "state.count must be a torch.Tensor, got int"),
    ((Q.double(), STATE), {}, TypeError, "state.kv must be torch.float64 for q of torch.float64"),
    ((Q.half(), STATE._replace(count=x(2).half())), {}, TypeError, "got state.count.dtype="),
    ((Q, STATE._replace(kv=STATE.kv.to("meta"))), {}, ValueError, "state.kv.device=meta"),
    ((Q, STATE._replace(kv=STATE.kv[0])), {}, ValueError, "got state.kv.shape=(3, 4, 6)"),
    ((Q[:1], STATE), {}, ValueError, "got q.shape=(1, 3, 5, 4) and state.kv.shape=(2, 3, 4, 6)"),
    ((Q[..., :3], STATE), {}, ValueError, "got q.shape=(2, 3, 5, 3) and state.kv.sh"),
    ((Q[:, :2], STATE), {}, ValueError, "got q.shape[1]=2 and state.kv.shape[1]=3"),
    ((Q, STATE._replace(key_sum=x(2, 4, 3))), {}, ValueError, "got state.key_sum.shape=(2, 4, 3)"),
    ((Q, STATE._replace(count=x(2, 1))), {}, ValueError, "state.count.shape=(2, 1)"),
    ((Q, STATE), {"normalizer": "max"}, ValueError, "must be 'mean' or 'sum', got 'max'"),
    ((Q, STATE), {"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
    ((Q, STATE), {"feature_map": "softmax"}, ValueError, "got 'softmax'"),
    ((Q, STATE), {"rotary": (x(7, 2),) * 2}, ValueError, "tokens, head_dim / 2)=(3, 5, 2), got "),
    ((x(2, 6, 5, 4), STATE), {"rotary": (x(6, 5, 2),) * 2}, ValueError, "6 heads of q and 3 of k"),
    ((Q, STATE), {"impl": "cuda"}, ValueError, "'triton' or 'reference', got 'cuda'"),
]  # fmt: skip

FOCUSED_CASES = [
    ((Q, K, V.half()), {}, TypeError, "v.dtype=torch.float16"),
    ((Q, K[:, :1], V[:, :1]), {}, ValueError, "no grouped heads, since it normalises over all of"),
    ((Q, K, V), {"focusing_factor": 0}, ValueError, "must be positive and at most 32, got 0"),
    ((Q, K, V), {"focusing_factor": 33}, ValueError, "must be positive and at most 32, got 33"),
    ((Q, K, V), {"focusing_factor": NAN}, ValueError, "must be positive and at most 32, got nan"),
    ((Q, K, V), {"focusing_factor": INF}, ValueError, "must be positive and at most 32, got inf"),
    ((Q, K, V), {"eps": NAN}, ValueError, "eps must be finite and not negative, got nan"),
    ((Q, K, V), {"scale": 0.5}, TypeError, "scale must be a torch.Tensor, got float"),
    ((Q, K, V), {"scale": x(3, 4).int()}, TypeError, "scale.dtype=torch.int32 is not supported"),
    ((Q, K, V), {"scale": x(1, 1, 12)}, ValueError, "=(3, 4), got scale.shape=(1, 1, 12). Pass a "),
    ((Q, K, V), {"scale": x(3, 4, device="meta")}, ValueError, "scale.device=meta"),
    ((Q, K, V), {"key_mask": x(2, 7)}, TypeError, "got key_mask.dtype=torch.float32"),
    ((Q, K, V), {"key_positions": 1.0}, TypeError, "key_positions must be a torch.Tensor, got flo"),
    ((Q, K, V), {"key_positions": x(3, 7, 4).int()}, TypeError, "key_positions.dtype=torch.int32"),
    ((Q, K, V), {"key_positions": x(3, 7, 4, device="meta")}, ValueError, "positions.device=meta"),
    ((Q, K, V), {"key_positions": x(7, 3, 4)}, ValueError, "=(3, 7, 4), got key_positions.shape=("),
    ((Q, K, V), {"key_positions": x(1, 7, 12)}, ValueError, "shape=(1, 7, 12). Pass a (1, keys"),
    ((Q, K, V), {"key_positions": x(2, 3, 7, 4)}, ValueError, "positions.shape=(2, 3, 7, 4). Pa"),
    ((Q, K, V), {"impl": "cuda"}, ValueError, "'triton' or 'reference', got 'cuda'"),
    ((Q, K, V), {"feature_map": "relu"}, TypeError, "unexpected keyword argument 'feature_map'"),
]  # fmt: skip

OTHERS = [
    (function, *case)
    for function, cases in (
        (linear_attn_state, STATE_CASES),
        (linear_attn_apply, APPLY_CASES),
        (focused_la, FOCUSED_CASES),
    )
    for case in cases
]


@pytest.mark.parametrize("function, args, options, error, message", OTHERS)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_other_functions(function, impl, args, options, error, message, launches):
    with pytest.raises(error, match=re.escape(message)):
        function(*args, **{"impl": impl, **options})
    assert launches == []
