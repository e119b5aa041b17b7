"""The rows of models that are linear already: each module, and the whole model around it."""

from ..unet.goals import Goal
from .rows import Row

_NO_MORE = Goal("accelerated", "stock", 1.0, quantity="peak_bytes")
_MODULE = (Goal("accelerated", "stock", 1 / 3), _NO_MORE)
_MODEL = (Goal("accelerated", "stock", 1 / 1.2), _NO_MORE)
# For trying the benchmark out.
_NONE = ()
# By kind and model: the batch for each side of the pictures, and the goals.
_MEASURED = {
    ("inference", "sana_attention"): ({1024: 2, 2048: 2, 4096: 2}, _MODULE),
    ("inference", "sana_video_attention"): ({832: 1}, _MODULE),
    ("inference", "dc_ae_attention"): ({1024: 1, 2048: 1, 4096: 1}, _MODULE),
    ("inference", "lite_mla"): ({512: 16, 1024: 4}, _MODULE),
    ("inference", "sana_1600m"): ({1024: 2, 2048: 2, 4096: 2}, _MODEL),
    ("inference", "sana_video_2b"): ({832: 1}, _MODEL),
    ("inference", "dc_ae_f32"): ({1024: 1, 2048: 1, 4096: 1}, _MODEL),
    ("inference", "efficientvit_l2"): ({224: 64, 512: 16, 1024: 4}, _MODEL),
    ("training", "sana_1600m"): ({1024: 2}, _MODEL),
}
_TINY = {
    ("inference", "tiny_sana"): ({256: 2}, _NONE),
    ("inference", "tiny_dc_ae"): ({32: 1}, _NONE),
    ("inference", "tiny_efficientvit"): ({64: 2}, _NONE),
    ("training", "tiny_sana"): ({256: 2}, _NONE),
}


def _rows(measured: dict) -> tuple[Row, ...]:
    return tuple(
        Row(kind, "eager", host, px, batch, attentions=("stock", "accelerated"), goals=goals)
        for (kind, host), (batches, goals) in measured.items()
        for px, batch in batches.items()
    )


LINEAR_ROWS = _rows(_MEASURED)
TINY_LINEAR_ROWS = _rows(_TINY)
