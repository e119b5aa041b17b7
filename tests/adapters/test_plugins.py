"""LinFusion beside other plugins of a UNet: put on and taken off in any order, nothing is left."""

import functools
import itertools

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor, XFormersAttnProcessor
from torch import nn
from untouched import modules

from fbila import LinFusion
from fbila.adapters import get_handle
from fbila.adapters.linfusion.attention import LinFusionAttention

IMAGE_TOKENS, IMAGE_DIM = 4, 16


def attention_shapes(unet) -> dict[str, tuple[int, int | None]]:
    """Channels, and channels of the text (None: self-attention), of every attention."""
    found = {name: unet.get_submodule(name.removesuffix(".processor")) for name in processors(unet)}
    return {
        name: (layer.inner_dim, layer.cross_attention_dim if layer.is_cross_attention else None)
        for name, layer in found.items()
    }


def ip_adapter_weights(unet) -> dict[str, dict[str, torch.Tensor]]:
    """An IP-Adapter checkpoint; its keys count the attention layers, of both kinds."""
    generator = torch.Generator().manual_seed(2)
    text_dim = unet.config.cross_attention_dim
    shapes = {"proj.weight": (IMAGE_TOKENS * text_dim, IMAGE_DIM), "norm.weight": (text_dim,)}
    shapes |= {"proj.bias": (IMAGE_TOKENS * text_dim,), "norm.bias": (text_dim,)}
    layers = {
        f"{index}.to_{which}_ip.weight": shape
        for index, shape in enumerate(attention_shapes(unet).values())
        for which in "kv"
        if shape[1]
    }
    return {
        part: {key: torch.randn(shape, generator=generator) for key, shape in wanted.items()}
        for part, wanted in (("image_proj", shapes), ("ip_adapter", layers))
    }


# Every plugin is a function that puts it on and gives the function that takes it off.


def linfusion(pipeline):
    return LinFusion.construct_for(pipeline, load_pretrained=False).unmount


def ip_adapter(pipeline):
    pipeline.unet._load_ip_adapter_weights([ip_adapter_weights(pipeline.unet)])
    return pipeline.unload_ip_adapter


def freeu(pipeline):
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return pipeline.disable_freeu


def tomesd(pipeline):
    package = pytest.importorskip("tomesd")
    package.apply_patch(pipeline, ratio=0.5, use_rand=False)
    return lambda: package.remove_patch(pipeline)


def deepcache(pipeline):
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipeline)
    helper.set_params(cache_interval=2)
    helper.enable()
    return helper.disable


def slicing(pipeline):
    pipeline.unet.set_attention_slice("max")
    return lambda: pipeline.unet.set_attention_slice(None)


def eager_processor(pipeline):
    pipeline.unet.set_attn_processor(AttnProcessor())
    return lambda: torch_processor(pipeline)


def default_processor(pipeline):
    pipeline.unet.set_default_attn_processor()
    return lambda: torch_processor(pipeline)


def torch_processor(pipeline):
    pipeline.unet.set_attn_processor(attention_processor.AttnProcessor2_0())
    return lambda: None


def xformers(pipeline):
    both = {True: attention_processor.AttnProcessor2_0(), False: XFormersAttnProcessor()}
    shapes = attention_shapes(pipeline.unet).items()
    pipeline.unet.set_attn_processor({name: both[bool(text)] for name, (_, text) in shapes})
    return lambda: torch_processor(pipeline)


def fused_projections(pipeline):
    pipeline.fuse_qkv_projections(vae=False)
    return lambda: pipeline.unfuse_qkv_projections(vae=False)


PLUGINS = {p.__name__: p for p in (linfusion, ip_adapter, freeu, tomesd, deepcache)}
SOFTMAX_WAYS = {
    p.__name__: p
    for p in (
        slicing,
        eager_processor,
        default_processor,
        torch_processor,
        xformers,
        fused_projections,
    )
}
ORDERS = (
    "linfusion other -other -linfusion",
    "linfusion other -linfusion -other",
    "other linfusion -other -linfusion",
    "other linfusion -linfusion -other",
)


@pytest.fixture(scope="module")
def new_pipeline(pipeline_folder):
    """A function that loads one more pipeline, always the same."""

    def load():
        pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="module")
def expected(new_pipeline):
    """A function: by the set of plugins that are on, what the pipeline makes.

    Without LinFusion, that is a pipeline which never saw it.
    """

    @functools.cache
    def answers(other):
        found = {frozenset(): latents(new_pipeline())}
        for first in ([], ["linfusion"]):
            pipeline = new_pipeline()
            for active in walk(pipeline, [*first, other]):
                if can_run(active):
                    found[active] = latents(pipeline)
        return found

    return answers


def walk(pipeline, steps):
    """Puts plugins on, and off ("-name"); after each step, the set of those that are on."""
    undo = {}
    for step in steps:
        name = step.removeprefix("-")
        if name == step:
            undo[name] = (PLUGINS | SOFTMAX_WAYS)[name](pipeline)
        else:
            undo.pop(name)()
        yield frozenset(undo)


def latents(pipeline) -> torch.Tensor:
    """What the pipeline makes, before the VAE; with an image prompt if it takes one."""
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    if pipeline.unet.encoder_hid_proj is not None:
        inputs["ip_adapter_image_embeds"] = [torch.randn(2, 1, IMAGE_DIM, generator=generator)]
    made = pipeline(
        "a cat", num_inference_steps=2, output_type="latent", generator=generator, **inputs
    )
    return made.images


def can_run(active) -> bool:
    return active != {"xformers"}  # which is not installed, and only LinFusion does without


def processors(unet) -> dict[str, str]:
    return {name: type(processor).__name__ for name, processor in unet.attn_processors.items()}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("other", [*list(PLUGINS)[1:], *SOFTMAX_WAYS])
def test_in_any_order(new_pipeline, expected, other, order):
    pipeline = new_pipeline()
    there = processors(pipeline.unet)
    for active in walk(pipeline, order.replace("other", other).split()):
        if can_run(active):
            assert torch.equal(latents(pipeline), expected(other)[active]), set(active)
    assert processors(pipeline.unet) == there


@pytest.mark.parametrize("other", list(PLUGINS)[1:])
def test_plugins_act_on_both_models(expected, other):
    answers = expected(other)
    assert len(answers) == 4
    for one, two in itertools.combinations(answers.values(), 2):
        assert not torch.allclose(one, two, rtol=1e-2)


@pytest.mark.parametrize("other", SOFTMAX_WAYS)
def test_ways_of_computing_softmax_leave_linear_attention_alone(expected, other):
    linear = expected(other)[frozenset({"linfusion"})]
    softmax = expected(other)[frozenset()]
    assert not torch.allclose(linear, softmax, rtol=1e-2)
    both = expected(other)[frozenset({"linfusion", other})]
    torch.testing.assert_close(both, linear, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["linfusion other", "other linfusion"])
@pytest.mark.parametrize("other", list(PLUGINS)[1:])
def test_disabled_beside_a_plugin(new_pipeline, expected, other, order):
    pipeline = new_pipeline()
    list(walk(pipeline, order.replace("other", other).split()))
    with get_handle(pipeline.unet).disabled():
        assert torch.equal(latents(pipeline), expected(other)[frozenset({other})])
    assert torch.equal(latents(pipeline), expected(other)[frozenset({"linfusion", other})])


def test_many_at_once_in_any_order(new_pipeline):
    pipeline = new_pipeline()
    softmax = latents(pipeline)
    orders = list(itertools.permutations(["deepcache", "ip_adapter", "linfusion", "tomesd"]))
    for put_on, take_off in zip(orders, sorted(orders, key=lambda o: o[::-1]), strict=True):
        list(walk(pipeline, [*put_on, *(f"-{name}" for name in take_off)]))
        assert torch.equal(latents(pipeline), softmax), (put_on, take_off)


class AttnProcessor2_0(nn.Module):
    """Plain softmax as Tencent's code asks for it: a module, named like diffusers' class."""

    def forward(self, attn, hidden_states, encoder_hidden_states=None, **_):
        softmax = attention_processor.AttnProcessor2_0()
        return softmax(attn, hidden_states, encoder_hidden_states)


class IPAttnProcessor2_0(nn.Module):
    """Cross-attention to an image, whose tokens follow those of the text."""

    def __init__(self, dim: int, text_dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(text_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(text_dim, dim, bias=False)

    def forward(self, attn, hidden_states, encoder_hidden_states=None, **_):
        text = encoder_hidden_states[:, :-IMAGE_TOKENS]
        image = encoder_hidden_states[:, -IMAGE_TOKENS:]
        seen = F.scaled_dot_product_attention(
            hidden_states, self.to_k_ip(image), self.to_v_ip(image)
        )
        return attention_processor.AttnProcessor2_0()(attn, hidden_states, text) + seen


def set_ip_adapter(unet, plain):
    """As Tencent's code does it, with `plain` for self-attention."""
    torch.manual_seed(3)
    unet.set_attn_processor(
        {
            name: IPAttnProcessor2_0(dim, text_dim) if text_dim else plain()
            for name, (dim, text_dim) in attention_shapes(unet).items()
        }
    )


def tencent_weights(unet) -> dict[str, torch.Tensor]:
    return nn.ModuleList(unet.attn_processors.values()).state_dict()


def test_tencent_checkpoints_count_the_same_layers(unet):
    set_ip_adapter(unet, AttnProcessor2_0)
    weights = tencent_weights(unet)
    assert list(weights)[:3] == ["1.to_k_ip.weight", "1.to_v_ip.weight", "3.to_k_ip.weight"]
    assert weights.keys() == ip_adapter_weights(unet)["ip_adapter"].keys()
    mounted = tiny_models.small_unet()
    LinFusion.construct_for(unet=mounted, load_pretrained=False)
    set_ip_adapter(mounted, AttnProcessor2_0)
    assert list(tencent_weights(mounted)) == list(weights)
    for key, weight in tencent_weights(mounted).items():
        assert torch.equal(weight, weights[key]), key


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("plain", [attention_processor.AttnProcessor2_0, AttnProcessor2_0])
def test_tencent_ip_adapter(unet, plain, first):
    softmax = tiny_models.predict(unet)
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    linear = tiny_models.predict(unet)
    if first:
        linfusion.unmount()
        set_ip_adapter(unet, plain)
        linfusion.mount_to(unet)
    else:
        set_ip_adapter(unet, plain)
    assert isinstance(unet.mid_block.attentions[0].transformer_blocks[0].attn1, LinFusionAttention)
    both = tiny_models.predict(unet)
    never_swapped = tiny_models.small_unet()
    set_ip_adapter(never_swapped, plain)
    adapted = tiny_models.predict(never_swapped)
    for one, two in itertools.combinations([softmax, linear, both, adapted], 2):
        assert not torch.allclose(one, two, atol=1e-3)
    linfusion.unmount()
    assert torch.equal(tiny_models.predict(unet), adapted)
    kinds = [type(processor) for processor in never_swapped.attn_processors.values()]
    assert [type(processor) for processor in unet.attn_processors.values()] == kinds


def new_controlnet(unet) -> ControlNetModel:
    torch.manual_seed(4)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    for zero in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        nn.init.normal_(zero.weight, std=0.1)
    return controlnet.eval()


def test_controlnet_residuals(unet):
    plain = tiny_models.unet_inputs(unet)
    with torch.no_grad():
        down, mid = new_controlnet(unet)(
            **plain, controlnet_cond=torch.rand(2, 3, 32, 32), return_dict=False
        )
    inputs = {
        **plain,
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": mid,
    }
    softmax = tiny_models.predict(unet, **inputs)
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    linear = tiny_models.predict(unet, **inputs)
    assert not torch.allclose(linear, softmax, atol=1e-3)
    assert not torch.allclose(linear, tiny_models.predict(unet, **plain), atol=1e-3)
    with linfusion.disabled():
        assert torch.equal(tiny_models.predict(unet, **inputs), softmax)
    assert torch.equal(tiny_models.predict(unet, **inputs), linear)
    linfusion.unmount()
    assert torch.equal(tiny_models.predict(unet, **inputs), softmax)


def test_a_controlnet_is_made_from_the_softmax_model(unet):
    expected = new_controlnet(unet).state_dict()
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    linear, there = tiny_models.predict(unet), modules(unet)
    with pytest.raises(RuntimeError, match=r"attn1\.to_q_\.0\.weight"):
        new_controlnet(unet)
    assert modules(unet) == there
    assert torch.equal(tiny_models.predict(unet), linear)
    with linfusion.disabled():
        made = new_controlnet(unet).state_dict()
    assert list(made) == list(expected)
    assert all(torch.equal(made[key], expected[key]) for key in expected)
