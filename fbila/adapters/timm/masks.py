"""What timm passes to softmax as a mask, as linear attention can take it.

Softmax adds b_ij to the logit of query i and key j. One that depends on the key alone multiplies
the key's weight by exp(b_j), in linear attention as in softmax, and -inf takes the key out.
"""

import torch
from torch import Tensor

from ..report import AdapterError

# At and below it exp is 0 in every dtype; timm hides keys by the least number of the dtype.
_HIDDEN = -1e4


def refuse_causal(is_causal: bool) -> None:
    """Linear attention here has no causal form.

    Raises:
        AdapterError: If one is asked for.
    """
    if is_causal:
        raise AdapterError(
            "is_causal=True: fbila is bidirectional only; see flash-linear-attention."
        )


def as_key_mask(mask: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """`key_mask` and `key_weight`, both `(B, N)` or None, for tokens x `(B, N, C)`.

    Args:
        mask: As for `scaled_dot_product_attention`: bool, True for keys that are seen, or added to
            the logits; `(B, 1, 1, N)` or whatever broadcasts to that.

    Raises:
        AdapterError: If it tells queries or heads apart.
    """
    if mask is None:
        return None, None
    B, N, _ = x.shape
    whole = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(whole) != 4 or whole[0] not in (1, B) or whole[1:] != (1, 1, N):
        raise AdapterError(
            f"attention_mask {list(mask.shape)} is not a key mask; linear attention can hide keys, "
            "not query-key pairs. A key mask broadcasts from [batch, 1, 1, tokens], as that of "
            "NaFlexVit with use_key_only_attn_mask=True."
        )
    mask = mask.reshape(whole[0], N).expand(B, N)
    if mask.dtype == torch.bool:
        return mask, None
    return mask > _HIDDEN, mask.exp()
