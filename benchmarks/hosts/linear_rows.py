"""The rows of models that are linear already: each module, and the whole model around it."""

from ..unet.goals import Goal
from .rows import Row

_NO_MORE = Goal("accelerated", "stock", 1.0, quantity="peak_bytes")
_MODULE = (Goal("accelerated", "stock", 1 / 3), _NO_MORE)
_FASTER = (Goal("accelerated", "stock", 1 / 1.2),)
_MODEL = (*_FASTER, _NO_MORE)
FROM_TOKENS = 1024
# For trying the benchmark out.
_NONE = ()
# By kind, dtype and model: the batch for each side of the pictures, and the goals.
_MEASURED = {
    ("inference", "float16", "sana_attention"): ({1024: 2, 2048: 2, 4096: 2}, _MODULE),
    ("inference", "float16", "sana_video_attention"): ({832: 1}, _MODULE),
    ("inference", "float16", "dc_ae_attention"): ({1024: 1, 2048: 1, 4096: 1}, _MODULE),
    ("inference", "float16", "lite_mla"): ({224: 64, 512: 16, 1024: 4}, _MODULE),
    ("inference", "float16", "sana_1600m"): ({1024: 2, 2048: 2, 4096: 2}, _MODEL),
    ("inference", "float16", "sana_video_2b"): ({832: 1}, _MODEL),
    ("inference", "float16", "dc_ae_f32"): ({1024: 1, 2048: 1, 4096: 1}, _MODEL),
    ("inference", "float16", "efficientvit_l2"): ({224: 64, 512: 16, 1024: 4}, _MODEL),
    ("inference", "bfloat16", "sana_attention"): ({1024: 2, 2048: 2, 4096: 2}, _MODULE),
    ("inference", "bfloat16", "sana_1600m"): ({1024: 2, 4096: 2}, _MODEL),
    ("training", "bfloat16", "sana_1600m"): ({1024: 2, 2048: 2}, _MODEL),
}
# At 1024 px Python takes longer than the GPU.
_CAPTURED = {("training", "bfloat16", "sana_1600m"): ({1024: 2, 2048: 2}, _FASTER)}
_TINY = {
    ("inference", "float16", "tiny_sana"): ({256: 2}, _NONE),
    ("inference", "float16", "tiny_sana_video"): ({64: 1}, _NONE),
    ("inference", "float16", "tiny_dc_ae"): ({32: 1}, _NONE),
    ("inference", "float16", "tiny_efficientvit"): ({64: 2}, _NONE),
    ("inference", "bfloat16", "tiny_sana"): ({256: 2}, _NONE),
    ("training", "bfloat16", "tiny_sana"): ({256: 2}, _NONE),
}
_TINY_CAPTURED = {("training", "bfloat16", "tiny_sana"): ({256: 2}, _NONE)}


def _rows(measured: dict, mode: str = "eager") -> tuple[Row, ...]:
    return tuple(
        Row(kind, mode, host, px, batch, _ways(host), goals=_of(goals, host, px), dtype=dtype)
        for (kind, dtype, host), (batches, goals) in measured.items()
        for px, batch in batches.items()
    )


def _ways(host: str) -> tuple[str, ...]:
    two = ("stock", "accelerated")
    return (*two, "projections") if host in ("sana_attention", "sana_video_attention") else two


def _of(goals: tuple[Goal, ...], host: str, px: int) -> tuple[Goal, ...]:
    """Those of a module begin at 1024 tokens: LiteMLA's, a sixteenth of the side, has fewer."""
    return (_NO_MORE,) if host == "lite_mla" and (px // 16) ** 2 < FROM_TOKENS else goals


LINEAR_ROWS = _rows(_MEASURED) + _rows(_CAPTURED, "graph")
TINY_LINEAR_ROWS = _rows(_TINY) + _rows(_TINY_CAPTURED, "graph")
