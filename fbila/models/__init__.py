"""Published models as architectures of timm: importing this registers them.

    import fbila.models, timm

    model = timm.create_model("flatten_swin_tiny", checkpoint_path="flatten_swin_t.pth")

One backbone a file, on timm's own blocks and the layers of `fbila.layers`; the keys and shapes of
their state dicts are those of the official releases.
"""
