"""What every model promises as an architecture of timm, besides its weights.

`make(**settings)` makes a small one: `timm.create_model` with a few channels and blocks.
"""

import copy
import hashlib
import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import create_feature_extractor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Make = Callable[..., nn.Module]


def noise(name: str, *shape: int) -> Tensor:
    """Evenly distributed in (-1, 1), and the same everywhere and forever: integers, hashed."""
    x = torch.arange(math.prod(shape)) * 2654435761 + zlib.crc32(name.encode())
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (x.double() / 2**31 - 1).float().view(shape)


def randomize(model: nn.Module) -> nn.Module:
    """Weights and statistics of which each matters, and which differ from block to block."""
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            x = noise(name, *t.shape) * (3 / max(t[:1].numel(), 16)) ** 0.5
            is_scale = t.dim() == 1 and not name.endswith(("bias", "mean"))
            t.copy_(x.abs() + 0.5 if is_scale else x)
    return model


def pictures(*size: int, channels: int = 3) -> Tensor:
    return noise("pictures", 2, channels, *size)


def assert_answers(model: nn.Module, size: tuple[int, int], official: list[float]) -> None:
    """The answer is that of the official code with the weights of `randomize`."""
    with torch.no_grad():
        answer = randomize(model).eval()(pictures(*size))[0]
    expected = torch.tensor(official)
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def gradients(model: Callable, x: Tensor) -> list[Tensor]:
    """The answer and the gradients of all parameters of the module that are trained."""
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), trained)]


# ---- keys and sizes ----


def key_lines(state_dict: Mapping[str, Tensor]) -> list[str]:
    """`name shape` of each entry, sorted."""
    return sorted(f"{name} {tuple(t.shape)}" for name, t in state_dict.items())


def digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def on_meta(name: str, **settings) -> nn.Module:
    """A whole model without memory."""
    return timm.create_model(name, device="meta", **settings).eval()


@torch.no_grad()
def multiplications(model: nn.Module, size: int = 224) -> dict[str, float]:
    """Billions of multiplications for one picture, by operator, for a model on meta.

    With "norm" as fvcore counts it, by which such numbers are published: 5 for an entry of a
    LayerNorm, 2 of a BatchNorm.
    """
    norms = 0

    def count(module: nn.Module, _, y: Tensor) -> None:
        nonlocal norms
        norms += y.numel() * (5 if isinstance(module, nn.LayerNorm) else 2)

    kinds = (nn.LayerNorm, nn.BatchNorm2d)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    counts = {str(op): n / 2e9 for op, n in counter.get_flop_counts()["Global"].items()}
    return counts | {"norm": norms / 1e9}


# ---- files ----


def assert_loads(make: Make, official: dict[str, Tensor], folder: Path) -> None:
    """Files as they are published fill the model, whatever else they hold that is no code."""
    expected = make()
    expected.load_state_dict(official)
    files = {
        "plain.pth": official,
        "model.pth": {"model": official, "max_accuracy": 83.5, "epoch": 300},
        "ema.pth": {"model": {}, "model_ema": official},
        "parallel.pth": {"model": {f"module.{name}": t for name, t in official.items()}},
    }
    for file, content in files.items():
        torch.save(content, folder / file)
    save_file(official, folder / "model.safetensors")
    for file in [*files, "model.safetensors"]:
        model = make(checkpoint_path=folder / file)
        _assert_same_state(model, expected)
    tuned = make(
        pretrained=True, pretrained_cfg_overlay={"file": str(folder / "model.pth")}, num_classes=3
    )
    ours, theirs = tuned.state_dict(), expected.state_dict()
    assert ours["head.weight"].shape[0] == 3
    assert all(torch.equal(t, ours[n]) for n, t in theirs.items() if not n.startswith("head."))


def assert_refuses_code(make: Make, official: dict[str, Tensor], folder: Path) -> None:
    """A class of the authors beside the weights is refused with one error that names it.

    A configuration, which is a kind of dict, can be read as a plain one.
    """
    file = folder / "configured.pth"
    configuration = Configuration(model=Configuration(name="tiny"), epochs=300)
    configuration.frozen = True
    torch.save({"model": official, "config": configuration}, file)
    with pytest.raises(RuntimeError, match=r"weights_only=True blocked .*contracts.Configuration"):
        make(checkpoint_path=file)
    stand_in = (OrderedDict, "contracts.Configuration")
    with torch.serialization.safe_globals([stand_in]):
        model = make(checkpoint_path=file)
    expected = make()
    expected.load_state_dict(official)
    _assert_same_state(model, expected)


class Configuration(dict):
    """As yacs has them, in checkpoints of code that goes back to Swin's."""


def assert_strict(make: Make, official: dict[str, Tensor]) -> None:
    """A missing, an unknown and a misshapen weight are errors."""
    name = next(iter(official))
    for changed in (
        {n: t for n, t in official.items() if n != name},
        official | {"other": torch.zeros(1)},
        official | {name: official[name][:-1]},
    ):
        with pytest.raises(RuntimeError, match=r"Error.* in loading state_dict"):
            make().load_state_dict(changed)


def _assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    for name, t in ours.state_dict().items():
        assert torch.equal(t, expected[name]), name


# ---- as timm uses it ----


def assert_features(make: Make, *size: int) -> None:
    """`features_only` and `forward_intermediates` are the stages of the whole model."""
    model = randomize(make()).eval()
    x = pictures(*size)
    with torch.no_grad():
        last, stages = model.forward_intermediates(x)
        torch.testing.assert_close(last, model.forward_features(x))
        for info, y in zip(model.feature_info, stages, strict=True):
            rows = [-(-n // info["reduction"]) for n in size]
            assert y.shape == (2, info["num_chs"], *rows)
        for indices in ((0, 1, 2, 3), (1,), (0, 2), (-1,)):
            backbone = make(features_only=True, out_indices=indices).eval()
            wanted = backbone.model.state_dict()
            backbone.model.load_state_dict({n: model.state_dict()[n] for n in wanted})
            assert backbone.feature_info.channels() == [stages[i].shape[1] for i in indices]
            for ours, i in zip(backbone(x), indices, strict=True):
                torch.testing.assert_close(ours, stages[i])
        early = model.forward_intermediates(x, [0, 1], stop_early=True, intermediates_only=True)
        for ours, theirs in zip(early, stages, strict=False):
            assert torch.equal(ours, theirs)
        (normed,) = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
        torch.testing.assert_close(normed, last.permute(0, 3, 1, 2))
    # Nothing is left in it that no feature needs: such parameters stop distributed training.
    backbone = randomize(make(features_only=True, out_indices=(0, 1)))
    loss = sum(y.square().sum() for y in backbone(x))
    assert all(g is not None for g in torch.autograd.grad(loss, backbone.parameters()))
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def assert_any_size(model: nn.Module, *sizes: tuple[int, int]) -> None:
    """One model takes pictures of any size, each as if it were the first."""
    randomize(model).eval()
    with torch.no_grad():
        answers = [copy.deepcopy(model)(pictures(*size)) for size in sizes]
        for size, expected in zip(sizes, answers, strict=True):
            assert expected.shape == (2, model.num_classes) and expected.isfinite().all()
            torch.testing.assert_close(model(pictures(*size)), expected)
        assert not torch.allclose(answers[0], answers[1])


def assert_compiles(model: nn.Module, *sizes: tuple[int, int]) -> None:
    """Sizes by one graph, forward and backward."""
    randomize(model).eval()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for size in sizes:
        x = pictures(*size)
        for ours, theirs in zip(gradients(compiled, x), gradients(model, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def assert_compiles_for_one_size(model: nn.Module, size: tuple[int, int]) -> None:
    """One graph, forward and backward, as `torch.compile` begins with."""
    randomize(model).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    x = pictures(*size)
    for ours, theirs in zip(gradients(compiled, x), gradients(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max())


def assert_traces(model: nn.Module, *sizes: tuple[int, int]) -> None:
    """Features by name from a graph of FX, for any size, of what the model has learned."""
    randomize(model).eval()
    names = [info["module"] for info in model.feature_info]
    extractor = create_feature_extractor(model, [*names, "head"])
    # What is computed while a graph is traced would be constants of its own.
    assert extractor.state_dict().keys() <= model.state_dict().keys()
    with torch.no_grad():
        for size in sizes:
            x = pictures(*size)
            stages = model.forward_intermediates(x, intermediates_only=True)
            found = extractor(x)
            torch.testing.assert_close(found["head"].flatten(1), model(x))
            for name, expected in zip(names, stages, strict=True):
                torch.testing.assert_close(found[name].permute(0, 3, 1, 2), expected)


def assert_checkpoints_gradients(model: nn.Module, *size: int) -> None:
    """Blocks run a second time in the backward pass, to the same gradients."""
    randomize(model).eval()
    expected = gradients(model, pictures(*size))
    calls: list[nn.Module] = []
    for name, module in model.named_modules():
        if name in {info["module"] for info in model.feature_info}:
            module.register_forward_pre_hook(lambda module, _: calls.append(module))
    for enable, times in ((True, 2), (False, 1)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        for ours, theirs in zip(gradients(model, pictures(*size)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert len(calls) == times * len(model.feature_info)


def assert_low_precision(model: nn.Module, *size: int) -> None:
    """In bfloat16, by autocast or throughout, the answer is that of float32 to a few digits."""
    randomize(model).eval()
    x = pictures(*size)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            answers = [model(x)]
        answers.append(model.bfloat16()(x.bfloat16()))
    for answer in answers:
        assert answer.dtype == torch.bfloat16
        assert (answer - expected).norm() <= 0.05 * expected.norm()


def assert_maps_read_norms(model: nn.Module, monkeypatch, *size: int) -> None:
    """What norms answer for maps under autocast is what the maps would have cast: no bit differs.

    Norms answer in float32 else, as on a GPU, and all other norms do.
    """
    layer_norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *others: layer_norm(x.float(), *others))
    norms = [m for m in randomize(model).eval().modules() if getattr(m, "for_maps", False)]
    assert norms
    kinds = set()
    for norm in norms:
        norm.register_forward_hook(lambda _module, _inputs, y: kinds.add(y.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer = model(pictures(*size))
        assert kinds == {torch.bfloat16}
        for norm in norms:
            norm.for_maps = False
        assert torch.equal(model(pictures(*size)), answer)


def assert_classifier(make: Make, *size: int) -> None:
    """Classifiers are replaced, left out, and given what timm says they are given."""
    model = randomize(make()).eval()
    x = pictures(*size)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((1, 2)))
        assert pooled.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(model.get_classifier()(_as_taken(model, pooled)).flatten(1),
                                   model(x))  # fmt: skip
        model.reset_classifier(7)
        assert model(x).shape == (2, 7) and model.num_classes == 7
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(0, "")
        assert model(x).dim() == 4 and model(x).numel() == features.numel()
        bare = make(num_classes=0).eval()
        bare.load_state_dict(model.state_dict())
        torch.testing.assert_close(bare(x), pooled)


def _as_taken(model: nn.Module, pooled: Tensor) -> Tensor:
    return pooled[..., None, None] if isinstance(model.head, nn.Conv2d) else pooled


def assert_settings(make: Make, *size: int) -> None:
    """in_chans, dropout, stochastic depth, device and dtype reach what they should."""
    gray = make(in_chans=1).eval()
    assert gray(pictures(*size, channels=1)).shape == (2, gray.num_classes)
    x = pictures(*size)
    plain = make()
    for name in ("drop_path_rate", "drop_rate", "proj_drop_rate"):
        model = make(**{name: 0.5})
        model.load_state_dict(plain.state_dict())
        randomize(model)
        with torch.no_grad():
            torch.manual_seed(0)
            first, second = model(x), model(x)
            assert not torch.allclose(first, second), name
            model.eval()
            assert torch.equal(model(x), model(x)), name
    low = make(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in low.parameters()} == {("meta", torch.bfloat16)}
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        make(pretrained=True)


def assert_learning_rate_layers(model: nn.Module) -> None:
    """timm's layer-wise learning rates rise from the stem over the blocks to the head."""
    layers = timm.models.group_parameters(model, model.group_matcher())
    assert sum(len(names) for names in layers.values()) == len(list(model.parameters()))
    assert all(name.startswith(("patch_embed", "pos_embed")) for name in layers[0])
    assert all(name.startswith("head") for name in layers[max(layers)])
