"""Why the other attention classes of timm keep their softmax.

Linear attention takes the weight of a key for a query apart, phi(q) . phi(k). What adds to the
logits of single pairs, or mixes them, cannot be taken apart; and some classes are linear already,
or attend to a few keys, where there is nothing to gain.
"""

from torch import nn

_BIAS = "has a position bias on pairs of tokens"
_WINDOW_BIAS = "attends within windows, with a position bias on pairs of tokens"
_COSINE = "attends within windows, by the cosine of queries and keys and a position bias"
_WINDOW = "attends within windows of few tokens"
_REDUCED = "has its keys reduced to few tokens already"
_POOLED = "attends within windows or mask units, with pooled queries"
_POOLED_BIAS = "has its keys pooled, and a position bias on pairs of tokens"
_LINEAR = "is linear in the tokens already"
_CHANNELS = "attends over channels, and is linear in the tokens already"
_ONE_QUERY = "has one query, or a few learned ones, and is linear in the tokens already"
_INLINE = "computes attention within the block, where there is no module to replace"
_LAYOUT = "takes its tokens as a picture, not as (batch, tokens, channels)"
_OWN = "is a class of its own, with another interface"

# By module (within timm) and class.
_REASONS = {
    "layers.attention2d.Attention2d": _LAYOUT,
    "layers.attention2d.MultiQueryAttention2d": _LAYOUT,
    "layers.attention2d.MultiQueryAttentionV2": _LAYOUT,
    "layers.attention_pool.AttentionPoolLatent": _ONE_QUERY,
    "layers.attention_pool.AttentionPoolPrr": _ONE_QUERY,
    "layers.attention_pool2d.AttentionPool2d": _ONE_QUERY,
    "layers.attention_pool2d.RotAttentionPool2d": _ONE_QUERY,
    "layers.bottleneck_attn.BottleneckAttn": _BIAS,
    "layers.diff_attention.DiffAttention": "is the difference of two softmax attentions",
    "layers.halo_attn.HaloAttn": _WINDOW_BIAS,
    "layers.lambda_layer.LambdaLayer": _LINEAR,
    "models.beit.Attention": _BIAS,
    "models.cait.ClassAttn": _ONE_QUERY,
    "models.cait.TalkingHeadAttn": "mixes the logits of its heads (talking heads)",
    "models.coat.FactorAttnConvRelPosEnc": _LINEAR,
    "models.convit.GPSA": "gates softmax with a position bias on pairs of tokens",
    "models.convit.MHSA": _OWN,
    "models.cpubone.ConvAttention": _REDUCED,
    "models.crossvit.CrossAttention": _ONE_QUERY,
    "models.davit.ChannelAttention": _CHANNELS,
    "models.davit.ChannelAttentionV2": _CHANNELS,
    "models.davit.WindowAttention": _WINDOW,
    "models.edgenext.CrossCovarianceAttn": _CHANNELS,
    "models.efficientformer.Attention": _BIAS,
    "models.efficientformer_v2.Attention2d": _BIAS,
    "models.efficientformer_v2.Attention2dDownsample": _BIAS,
    "models.efficientvit_mit.LiteMLA": _LINEAR,
    "models.efficientvit_msra.CascadedGroupAttention": _BIAS,
    "models.fastvit.Attention": _LAYOUT,
    "models.gcvit.WindowAttentionGlobal": _WINDOW_BIAS,
    "models.gemma4_vit.Gemma4Attention": _OWN,
    "models.hiera.MaskUnitAttention": _POOLED,
    "models.hieradet_sam2.MultiScaleAttention": _POOLED,
    "models.iformer.SHMA": _LAYOUT,
    "models.levit.Attention": _BIAS,
    "models.levit.AttentionDownsample": _BIAS,
    "models.lowformer.ConvAttention": _REDUCED,
    "models.maxxvit.Attention2d": _BIAS,
    "models.maxxvit.AttentionCl": _BIAS,
    "models.metaformer.Attention": _OWN,
    "models.mobilevit.LinearSelfAttention": _LINEAR,
    "models.mvitv2.MultiScaleAttention": _POOLED_BIAS,
    "models.mvitv2.MultiScaleAttentionPoolFirst": _POOLED_BIAS,
    "models.nest.Attention": _WINDOW,
    "models.nextvit.EfficientAttention": _REDUCED,
    "models.pvt_v2.Attention": _REDUCED,
    "models.shvit.SHSA": _LAYOUT,
    "models.swiftformer.EfficientAdditiveAttention": _LINEAR,
    "models.swin_transformer.WindowAttention": _WINDOW_BIAS,
    "models.swin_transformer_v2.WindowAttention": _COSINE,
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": _COSINE,
    "models.tiny_vit.Attention": _WINDOW_BIAS,
    "models.tnt.Attention": _OWN,
    "models.twins.GlobalSubSampleAttn": _REDUCED,
    "models.twins.LocallyGroupedAttn": _WINDOW,
    "models.vision_transformer.DiffParallelScalingBlock": _INLINE,
    "models.vision_transformer.ParallelScalingBlock": _INLINE,
    "models.vision_transformer_relpos.RelPosAttention": _BIAS,
    "models.vision_transformer_sam.Attention": _BIAS,
    "models.visformer.Attention": _LAYOUT,
    "models.volo.Attention": _LAYOUT,
    "models.volo.ClassAttention": _ONE_QUERY,
    "models.volo.OutlookAttention": "has no keys: each query tells the weights of its neighbours",
    "models.xcit.ClassAttn": _ONE_QUERY,
    "models.xcit.XCA": _CHANNELS,
}
# A block around one of those above, and two that are convolutions.
_NO_ATTENTION = {
    "models._efficientnet_blocks.MobileAttention",
    "models.csatv2.SpatialAttention",
    "models.nextvit.ConvAttention",
}


def why_not_of_class(module: nn.Module) -> str:
    """Why a module that computes attention is none that can be replaced; `""` if it computes none.

    Args:
        module: Any module but timm's `Attention`, `AttentionRope` and `EvaAttention`.
    """
    kind = type(module)
    place = f"{kind.__module__}.{kind.__qualname__}".removeprefix("timm.")
    if place in _REASONS:
        return _REASONS[place]
    if kind.__name__.endswith("Attention") and place not in _NO_ATTENTION:
        return "is not exactly timm's Attention, AttentionRope or EvaAttention"
    return ""
