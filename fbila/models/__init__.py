"""Published models as architectures of timm: importing this registers them.

    import fbila.models, timm

    model = timm.create_model("flatten_swin_tiny", checkpoint_path="flatten_swin_t.pth")

One backbone a file, on timm's own blocks and the layers of `fbila.layers`; the keys and shapes of
their state dicts are those of the official releases.
"""

from ..adapters.host import host

with host("timm"):
    from .mlla import MLLA
    from .pvt import PyramidVisionTransformer
    from .ravlt import RAVLT
    from .swin import SwinTransformer
    from .vssd import VSSD

# Whose import registers names with timm.
from . import flatten, polaformer

__all__ = [
    "MLLA",
    "RAVLT",
    "VSSD",
    "PyramidVisionTransformer",
    "SwinTransformer",
    "flatten",
    "polaformer",
]
