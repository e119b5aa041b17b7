"""A mounted UNet compiles without a break, and trains under gradient checkpointing."""

import pytest
import tiny_models
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fbila import LinFusion


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def test_compiles_as_one_graph(unet):
    LinFusion.construct_for(unet=unet, load_pretrained=False)
    expected = tiny_models.predict(unet)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    torch.testing.assert_close(tiny_models.predict(compiled), expected, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


def test_switching_recompiles_once_and_stays_exact(unet):
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    softmax = tiny_models.predict(compiled)
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    linear = tiny_models.predict(compiled)
    assert not torch.allclose(softmax, linear, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            with linfusion.disabled():
                assert torch.equal(tiny_models.predict(compiled), softmax)
            assert torch.equal(tiny_models.predict(compiled), linear)


def test_a_foreign_processor_raises_when_compiled(unet):
    LinFusion.construct_for(unet=unet, load_pretrained=False)
    compiled = torch.compile(unet, backend="eager")
    tiny_models.predict(compiled)
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = object()
    with pytest.raises(Exception, match="would ignore it"):
        tiny_models.predict(compiled)


def test_gradient_checkpointing_trains_every_parameter_alike(unet):
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    for parameter in linfusion.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    unet.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        unet(**tiny_models.unet_inputs(unet)).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in linfusion.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-8)
