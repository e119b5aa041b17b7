"""Malformed calls raise before anything runs, and the message carries the values."""

import re

import pytest
import torch
from helpers import zeros as x

from fbila import linear_attn, simple_la

Q, K, V = x(2, 3, 5, 4), x(2, 3, 7, 4), x(2, 3, 7, 6)
INF, NAN = float("inf"), float("nan")

CASES = [
    # types
    ((Q, K, None), {}, TypeError, "v must be a torch.Tensor, got NoneType"),
    ((Q.tolist(), K, V), {}, TypeError, "q must be a torch.Tensor, got list"),
    ((Q, K.to_sparse(), V), {}, TypeError, "k must be a dense strided tensor, got layout torch.sp"),
    ((Q, K.int(), V), {}, TypeError, "k.dtype=torch.int32 is not supported"),
    ((Q.to(torch.cfloat), K, V), {}, TypeError, "q.dtype=torch.complex64 is not supported"),
    ((Q.half(), K, V), {}, TypeError, "got q.dtype=torch.float16, k.dtype=torch.float32 and"),
    ((Q, K, V.double()), {}, TypeError, "v.dtype=torch.float64"),
    # shapes
    ((Q[0], K, V), {}, ValueError, "q must have 4 dimensions (batch, heads, tokens, head_dim)"),
    ((Q, K, V[None]), {}, ValueError, "v.shape=(1, 2, 3, 7, 6)"),
    ((Q, K[:1], V), {}, ValueError, "got q.shape[0]=2, k.shape[0]=1 and v.shape[0]=2"),
    ((Q, K, V[:, :1]), {}, ValueError, "got k.shape[1]=3 and v.shape[1]=1"),
    ((Q, K[:, :2], V[:, :2]), {}, ValueError, "got q.shape[1]=3 and k.shape[1]=2"),
    ((Q, K, V[:, :, :5]), {}, ValueError, "got k.shape[-2]=7 and v.shape[-2]=5"),
    ((Q, K[..., :3], V), {}, ValueError, "got q.shape[-1]=4 and k.shape[-1]=3"),
    ((Q[..., :0], K[..., :0], V), {}, ValueError, "must be at least 1, got q.shape[-1]=0"),
    ((x(1, 1, 2, 257), x(1, 1, 3, 257), x(1, 1, 3, 4)), {}, ValueError, "got q.shape[-1]=257"),
    ((x(1, 1, 2, 4), x(1, 1, 3, 4), x(1, 1, 3, 300)), {}, ValueError, "got v.shape[-1]=300"),
    ((Q, K.to("meta"), V), {}, ValueError, "k.device=meta"),
    # options
    ((Q, K, V), {"feature_map": "softmax"}, ValueError, "got 'softmax'"),
    ((Q, K, V), {"feature_map": "none"}, ValueError, "'relu_offset', 'exp', 'signed', got 'none'"),
    ((Q, K, V), {"impl": "cuda"}, ValueError, "'triton' or 'reference', got 'cuda'"),
]  # fmt: skip

OPTIONS_OF_ONE = [
    (linear_attn, {"normalizer": "max"}, ValueError, "must be 'mean' or 'sum', got 'max'"),
    (linear_attn, {"normalizer": None}, ValueError, "must be 'mean' or 'sum', got None"),
    (linear_attn, {"eps": -1e-6}, ValueError, "eps must be finite and not negative, got -1e-06"),
    (linear_attn, {"eps": NAN}, ValueError, "eps must be finite and not negative, got nan"),
    (linear_attn, {"eps": INF}, ValueError, "eps must be finite and not negative, got inf"),
    (linear_attn, {"scale": 0.5}, TypeError, "unexpected keyword argument 'scale'"),
    (simple_la, {"scale": INF}, ValueError, "scale must be finite, got inf"),
    (simple_la, {"scale": NAN}, ValueError, "scale must be finite, got nan"),
    (simple_la, {"eps": 1e-6}, TypeError, "unexpected keyword argument 'eps'"),
    (simple_la, {"normalizer": "mean"}, TypeError, "unexpected keyword argument 'normalizer'"),
]


@pytest.mark.parametrize("args, options, error, message", CASES, ids=[c[3] for c in CASES])
@pytest.mark.parametrize("function", [linear_attn, simple_la])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_both(function, impl, args, options, error, message, launches):
    with pytest.raises(error, match=re.escape(message)):
        function(*args, **{"impl": impl, **options})
    assert launches == []


@pytest.mark.parametrize("function, options, error, message", OPTIONS_OF_ONE)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_one(function, impl, options, error, message, launches):
    with pytest.raises(error, match=re.escape(message)):
        function(Q, K, V, impl=impl, **options)
    assert launches == []


def test_a_fourth_positional_argument_is_refused():
    with pytest.raises(TypeError, match="3 positional arguments"):
        linear_attn(Q, K, V, "elu1")


def test_nested_tensors():
    nested = torch.nested.nested_tensor([Q[0], Q[1]], layout=torch.jagged)
    with pytest.raises(TypeError, match="q must be a dense strided tensor, got layout"):
        linear_attn(nested, K, V)


def test_triton_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = (t.cpu() for t in (Q, K, V))
    with pytest.raises(ValueError, match="impl='triton' needs CUDA tensors, got device='cpu'"):
        linear_attn(q, k, v, impl="triton")
    assert linear_attn(q, k, v, feature_map="elu1").shape == (2, 3, 5, 6)


def test_bfloat16_in_the_interpreter(monkeypatch, launches):
    # Its dot products of bfloat16 are wrong by many orders of magnitude, without a word.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, v = (t.cpu().bfloat16() for t in (Q, K, V))
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="bfloat16"):
        linear_attn(q, k, v, impl="triton")
    assert launches == []
    assert linear_attn(q, k, v, feature_map="elu1", impl="reference").dtype == torch.bfloat16
