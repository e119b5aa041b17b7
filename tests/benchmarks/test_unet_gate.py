"""The transcribed layer is LinFusion's, and what computes something else has no time."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fbila.layers.linfusion as linfusion_layer
from benchmarks.nearness import Wrong, relative
from benchmarks.peers import Absent
from benchmarks.unet import attentions as attentions_module
from benchmarks.unet.attentions import Attentions
from benchmarks.unet.gate import TOLERANCE, Gate
from benchmarks.unet.inference import Inference
from benchmarks.unet.models import make_unet
from benchmarks.unet.official import OfficialAttention
from benchmarks.unet.rows import Row
from benchmarks.unet.training import Training
from fbila.layers import GeneralizedLinearAttention


@pytest.fixture(scope="module")
def gate():
    return Gate()


@pytest.fixture(scope="module")
def inference(gate):
    return Inference(Row("eager", "tiny", 64), "cpu", gate)


@pytest.fixture
def training(gate):
    return Training(Row("train", "tiny", 64, mode="train"), "cpu", gate)


@pytest.mark.parametrize(
    ("n", "dim", "heads", "mid_dim"), [(50, 80, 2, None), (64, 64, 1, 4), (7, 32, 4, 64)]
)
def test_transcription_equals_the_layer(n, dim, heads, mid_dim):
    torch.manual_seed(0)
    layer = GeneralizedLinearAttention(dim, heads, mid_dim)
    official = OfficialAttention(dim, heads, mid_dim)
    official.load_state_dict(layer.state_dict())
    x = 2 * torch.randn(2, n, dim)
    with torch.no_grad():
        torch.testing.assert_close(official(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fbila", "fbila fused", "fbila fused blocks"])
def test_unets_agree_in_float32(name):
    attentions = Attentions(make_unet("tiny", "cpu", torch.float32), None)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(2, 7, 32),
    }
    outputs = []
    for way in ("official", name, "sdpa"):
        with torch.no_grad(), attentions.put_in(way):
            outputs.append(attentions.unet(**inputs).sample)
    official, ours, softmax = outputs
    assert relative(ours, official) < 1e-5
    assert relative(softmax, official) > 0.1


def test_the_unet_is_as_it_was_after_each(inference):
    unet = inference.attentions.unet

    def modules():
        return {name: (module, type(module)) for name, module in unet.named_modules()}

    before = modules()
    for name in ("official", "fbila", "fbila fused", "fbila fused blocks"):
        with inference.attentions.put_in(name):
            assert modules() != before
        assert modules() == before


@pytest.mark.parametrize("name", ["official", "fbila", "fbila fused", "fbila fused blocks"])
def test_right_attention_passes(inference, name):
    with inference.ready(name) as (call, errors):
        assert call().isfinite().all()
    assert 0 < errors["float32"] <= errors["float32_bound"] < 1e-2
    assert errors["official"] < TOLERANCE / 4


def test_softmax_is_not_held_to_linear_attention(inference):
    with inference.ready("sdpa") as (_, errors):
        assert errors == {}


def another_feature_map(linear_attn):
    return lambda q, k, v, **o: linear_attn(q, k, v, **{**o, "feature_map": "relu"})


def half_of_the_keys(linear_attn):
    return lambda q, k, v, **o: linear_attn(
        q, k[:, :, : k.shape[2] // 2], v[:, :, : k.shape[2] // 2], **o
    )


def queries_for_keys(linear_attn):
    return lambda q, k, v, **o: linear_attn(q, q, v, **o)


def exchanged_heads(linear_attn):
    return lambda q, k, v, **o: linear_attn(q, k, v, **o).flip(1)


def softmax(linear_attn):
    return lambda q, k, v, **o: F.scaled_dot_product_attention(q, k, v)


def not_a_number(linear_attn):
    return lambda q, k, v, **o: linear_attn(q, k, v, **o) * float("nan")


MISTAKES = [
    another_feature_map,
    half_of_the_keys,
    queries_for_keys,
    exchanged_heads,
    softmax,
    not_a_number,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_attention_is_refused(inference, mistake, monkeypatch):
    monkeypatch.setattr(linfusion_layer, "linear_attn", mistake(linfusion_layer.linear_attn))
    # At the smallest size, against float32; what was found before does not count.
    monkeypatch.setattr(inference, "gate", Gate())
    with pytest.raises(Wrong, match="error against float32"), inference.ready("fbila"):
        pass


@pytest.mark.parametrize("mistake", MISTAKES)
def test_attention_that_is_wrong_at_one_size_is_refused(inference, mistake, monkeypatch):
    with inference.ready("fbila"):
        pass  # The gate has seen that it is right at the smallest size.
    monkeypatch.setattr(linfusion_layer, "linear_attn", mistake(linfusion_layer.linear_attn))
    with pytest.raises(Wrong, match="from the official layer"), inference.ready("fbila"):
        pass


def test_wrong_projections_are_refused(inference, monkeypatch):
    monkeypatch.setattr(inference, "gate", Gate())
    layer = inference.attentions.linfusion.layers[1]
    monkeypatch.setattr(layer.to_q_, "forward", lambda x: torch.zeros_like(x))
    with pytest.raises(Wrong, match="error against float32"), inference.ready("fbila"):
        pass


def test_an_imprecise_attention_is_refused(inference, monkeypatch):
    """Within the tolerance, yet farther from float32 than float16 has to be."""
    linear_attn = linfusion_layer.linear_attn

    def coarse(q, k, v, **options):
        return linear_attn(q, k, v.bfloat16().to(v), **options).bfloat16().to(v)

    monkeypatch.setattr(linfusion_layer, "linear_attn", coarse)
    monkeypatch.setattr(inference, "gate", Gate())
    with pytest.raises(Wrong, match="error against float32"), inference.ready("fbila"):
        pass


@pytest.mark.parametrize("name", ["fbila", "fbila fused blocks"])
def test_right_gradients_pass(training, name):
    with training.ready(name) as (step, errors):
        losses = [step().item() for _ in range(3)]
    assert errors["float32"] <= errors["float32_bound"] < 0.1
    assert losses[2] < losses[0]
    assert not any(p.requires_grad for p in training.attentions.linfusion.parameters())


def test_all_learn_the_same_from_the_same_teacher(training):
    losses = []
    for name in ("official", "fbila", "fbila fused blocks"):
        layers = training.attentions.layers(name)
        before = copy.deepcopy(layers)

        def unchanged(layers=layers, before=before):
            pairs = zip(before.parameters(), layers.parameters(), strict=True)
            return [torch.equal(x, y) for x, y in pairs]

        with training.ready(name) as (step, _):
            losses.append(step().item())
            assert not any(unchanged())
        # For the next to start from.
        assert all(unchanged())
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=2e-2)
    # Linear attention is not what softmax attention is.
    assert losses[0] > 1e-3


def test_wrong_gradients_are_refused(training, monkeypatch):
    linear_attn = linfusion_layer.linear_attn

    def half_the_gradient(q, k, v, **options):
        return linear_attn(q, k, (v + v.detach()) / 2, **options)

    monkeypatch.setattr(linfusion_layer, "linear_attn", half_the_gradient)
    with pytest.raises(Wrong, match="error of the gradients"), training.ready("fbila"):
        pass


def test_without_low_memory(inference, monkeypatch):
    def missing(unet):
        raise Absent("not available")

    monkeypatch.setattr(attentions_module, "low_memory", missing)
    with pytest.raises(Absent), inference.ready("fbila low memory"):
        pass


def test_low_memory_is_on_in_its_row(inference, monkeypatch):
    seen = []

    class Mode:
        def __init__(self, unet):
            self.unet = unet

        def __enter__(self):
            seen.append(type(self.unet.get_submodule(name)).__name__)

        def __exit__(self, *error):
            seen.append("undone")

    name = next(iter(inference.attentions.official))
    monkeypatch.setattr(attentions_module, "low_memory", Mode)
    with inference.attentions.put_in("fbila low memory"):
        assert seen == ["LinFusionAttention"]
    assert seen == ["LinFusionAttention", "undone"]
