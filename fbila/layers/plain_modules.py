"""Which modules do what their class says and nothing else, so that their weights say it all.

And what a module is made of, found where `nn.Module.__getattr__` finds it, without the detour: a
model asks for something hundreds of times in a forward pass.
"""

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def parameter(module: nn.Module, name: str) -> Any:
    """`module.<name>`, soonest if it is a parameter; it may be computed, or None."""
    own = module._parameters
    # Not `get`: DeepSpeed has dictionaries there that gather what is asked for in this way.
    return own[name] if name in own else getattr(module, name)


def plain(module: nn.Module, kind: type) -> bool:
    """Whether calling the module does what its class says and nothing else."""
    own = module.__dict__
    return (
        type(module) is kind
        and "forward" not in own
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and not _has_any_global_hook()
    )


def idle(module: nn.Module, dropout: type = nn.Dropout) -> bool:
    """Whether calling the module returns its input: an identity, or a `dropout` that is off."""
    if type(module) is nn.Identity:
        return plain(module, nn.Identity)
    own = module.__dict__
    # By the name that PyTorch has for it, or timm.
    off = not own["training"] or own.get("p", own.get("drop_prob")) == 0
    return off and plain(module, dropout)


def is_depthwise(conv: Any, channels: int) -> bool:
    """Whether it is a plain convolution of each channel by itself that keeps height and width."""
    if not plain(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        return False
    size = conv.kernel_size[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels == channels
        and conv.kernel_size == (size, size)
        and size % 2 == 1
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding in ("same", (size // 2, size // 2))
    )


def is_pointwise(conv: Any) -> bool:
    """Whether it is a plain 1 x 1 convolution, in any number of groups."""
    return (
        plain(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ("same", "valid", (0, 0))
    )
