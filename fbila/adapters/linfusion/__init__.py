"""LinFusion: linear attention for the UNets of Stable Diffusion, put in and out in one line.

    linfusion = LinFusion.construct_for(pipeline)  # finds the weights, replaces attn1 everywhere
    with linfusion.disabled(): ...                 # the softmax model, bit for bit
    linfusion.unmount()                            # the same modules again

Checkpoints are those of the paper's code: config.json with `modules_list`, and tensors named
`{index in modules_list}.to_q.weight` and so on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..carry import require_carriable
from ..diffusers import plan, resolve_model
from ..hooks import casting, placement
from ..host import host
from ..lora import own_parameters, tuners, unfused, without_tuners
from ..report import AdapterError, LayerDrift, SwapReport, require_match
from ..swap import SwapHandle, get_handle, swap_modules
from .attention import LinFusionAttention
from .checks import require_fit, require_fusible, require_kept, require_usable
from .weights import find_weights

with host("diffusers"):
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config


class LinFusion(ModelMixin, ConfigMixin):
    """The linear attention layers for one UNet, with their own weights.

    Args:
        modules_list: One dict a layer: `module_name` (its path in the UNet), `dim_n` (channels),
            `heads`, and `projection_mid_dim` (None: as `dim_n`; -1: no non-linear projection).

    Raises:
        AdapterError: If there are no layers, as when the configuration is another model's.
    """

    @register_to_config
    def __init__(self, modules_list: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__()
        if not modules_list:
            raise AdapterError("This is no LinFusion: its configuration has no modules_list.")
        for index, layer in enumerate(modules_list):
            self.add_module(
                str(index),
                LinFusionAttention(
                    layer["dim_n"],
                    layer["heads"],
                    layer["projection_mid_dim"],
                    name=layer["module_name"],
                ),
            )
        self._handle: SwapHandle | None = None

    @classmethod
    def get_default_config(
        cls, pipeline: Any = None, unet: Any = None, *, mid_dim_scale: int | None = None
    ) -> dict[str, Any]:
        """The constructor arguments for a UNet: one layer for every spatial self-attention.

        Args:
            pipeline: A pipeline with a UNet; or
            unet: the UNet itself.
            mid_dim_scale: The non-linear projections' width is `dim_n // mid_dim_scale`; None means
                `dim_n`. The published SDXL weights have 16.

        Raises:
            AdapterError: If there is no UNet, or no such attention in it.
        """
        report = plan(pipeline if unet is None else unet)
        require_match(report)
        modules_list = []
        for entry in report.swapped:
            dim = entry.heads * entry.head_dim
            modules_list.append(
                {
                    "module_name": entry.name,
                    "dim_n": dim,
                    "heads": entry.heads,
                    "projection_mid_dim": dim // mid_dim_scale if mid_dim_scale else None,
                }
            )
        return {"modules_list": modules_list}

    @classmethod
    def construct_for(
        cls,
        pipeline: Any = None,
        unet: Any = None,
        load_pretrained: bool = True,
        pretrained_model_name_or_path: str | Path | None = None,
        pipe_name_path: str | Path | None = None,
        *,
        mid_dim_scale: int | None = None,
        keep_original: str = "device",
        **from_pretrained_kwargs: Any,
    ) -> "LinFusion":
        """Makes the layers for a pipeline's UNet and mounts them.

        Args:
            pipeline: A pipeline with a UNet; or
            unet: the UNet itself.
            load_pretrained: False starts from the UNet's own projections, to be trained.
            pretrained_model_name_or_path: Folder or Hub id of the weights. None looks for a
                `linfusion` folder in the folder that the pipeline came from, then for published
                weights for a UNet of this shape.
            pipe_name_path: Where the pipeline came from, if it cannot tell by itself.
            mid_dim_scale: As in `get_default_config`, where `load_pretrained` is False.
            keep_original: As in `mount_to`.
            **from_pretrained_kwargs: `variant`, `revision`, `cache_dir` and others, passed to
                `from_pretrained`.

        Returns:
            The mounted layers. Their `report` says what was replaced.

        Raises:
            AdapterError: If there is no UNet, no attention to replace, no weights, weights for
                another UNet, or a swap mounted already. The UNet is as it was.

        Example:
            >>> from diffusers import UNet2DConditionModel
            >>> unet = UNet2DConditionModel(
            ...     block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
            ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
            >>> linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
            >>> linfusion.mounted, len(linfusion.report.swapped)
            (True, 6)
        """
        require_kept(keep_original)
        model = resolve_model(pipeline if unet is None else unet)
        if get_handle(model) is not None:
            raise AdapterError(
                f"{type(model).__name__} carries a swap already. Undo it first: linfusion.unmount()"
                ", or fbila.adapters.unswap(unet)."
            )
        report = plan(model)
        require_match(report)
        if not load_pretrained:
            config = cls.get_default_config(unet=model, mid_dim_scale=mid_dim_scale)
            linfusion = cls._start_from(model, config)
        else:
            if mid_dim_scale is not None:
                raise AdapterError(
                    "mid_dim_scale is for load_pretrained=False; weights have theirs."
                )
            path = pretrained_model_name_or_path
            if path is None:
                path = find_weights(
                    model, report, pipe_name_path or getattr(pipeline, "name_or_path", None)
                )
            linfusion = cls.from_pretrained(path, **from_pretrained_kwargs)
        linfusion.mount_to(unet=model, keep_original=keep_original)
        return linfusion

    @classmethod
    def _start_from(cls, unet: nn.Module, config: dict[str, Any]) -> "LinFusion":
        names = [layer["module_name"] for layer in config["modules_list"]]
        require_usable(unet, names, copied=True)
        originals: list[Any] = [unet.get_submodule(name) for name in names]
        device, dtype = placement(originals[0])
        with device:
            linfusion = cls(**config)
        for layer, original in zip(linfusion.layers, originals, strict=True):
            # Without a fused LoRA, which is put on the new layer when that is mounted.
            layer.to(dtype).start_from(
                SimpleNamespace(
                    to_q=unfused(original.to_q),
                    to_k=unfused(original.to_k),
                    to_v=unfused(original.to_v),
                    to_out=[unfused(original.to_out[0])],
                )
            )
        return linfusion

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "LinFusion":
        """Loads layers from a folder or from the Hub, in evaluation mode and not mounted.

        Raises:
            AdapterError: If tensors are missing from the checkpoint, or strange to it.
        """
        linfusion, info = super().from_pretrained(
            pretrained_model_name_or_path, **{**kwargs, "output_loading_info": True}
        )
        for problem in ("missing_keys", "unexpected_keys"):
            if info[problem]:
                raise AdapterError(
                    f"{pretrained_model_name_or_path} is no complete LinFusion checkpoint: "
                    f"{problem.replace('_', ' ')} {sorted(info[problem])[:3]} and "
                    f"{max(len(info[problem]) - 3, 0)} more."
                )
        return linfusion

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes config.json and the weights as safetensors, whether mounted or not.

        A LoRA that is on the layers is left out.

        Args:
            save_directory: Created if need be.
            **kwargs: `variant`, `max_shard_size` and others of diffusers' `save_pretrained`.

        Raises:
            AdapterError: If a LoRA is fused into the weights, or they are under offloading or
                casting that would spoil what is written.
        """
        module: Any = self
        for name, tuner in tuners(module).items():
            if tuner.merged_adapters:
                raise AdapterError(
                    f"A LoRA is fused into {name}. Call pipeline.unfuse_lora() before saving."
                )
        for layer in self.layers:
            require_carriable(layer.name, layer)
            if casting(layer) is not None:
                raise AdapterError(
                    f"{layer.name} is stored in {casting(layer).storage_dtype} by layerwise "
                    "casting, and saving that would lose precision. Save LinFusion before "
                    "enable_layerwise_casting()."
                )
        with without_tuners(module):
            super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    @property
    def layers(self) -> list[LinFusionAttention]:
        """The layers, in the order of `config.modules_list`."""
        return list(self.children())  # type: ignore[arg-type]

    @property
    def mounted(self) -> bool:
        """Whether the layers are in a UNet at this moment."""
        return self._handle is not None and self._handle.mounted

    @property
    def report(self) -> SwapReport:
        """What the last `mount_to` replaced, what it skipped and why."""
        if self._handle is None:
            raise AdapterError("This LinFusion has not been mounted; there is no report yet.")
        return self._handle.report

    def mount_to(
        self, pipeline: Any = None, unet: Any = None, *, keep_original: str = "device"
    ) -> SwapReport:
        """Puts the layers in the place of the UNet's own, on the same device and in the same dtype.

        Everything is checked before anything is changed. Mounting twice changes nothing.

        Args:
            pipeline: A pipeline with a UNet; or
            unet: the UNet itself.
            keep_original: Where the UNet's own layers wait to be put back: on its "device"; in the
                memory of the "cpu" (for SDXL's, 0.8 GB in float16), whence `disabled` and `unmount`
                fetch them; or "none": they are given up, and there is no way back.

        Raises:
            AdapterError: If the layers do not fit the UNet, which is then as it was.
        """
        require_kept(keep_original)
        model = resolve_model(pipeline if unet is None else unet)
        if self._handle is not None and self._handle.attached:
            if self._handle.model is model:
                return self.report
            raise AdapterError("This LinFusion is mounted on another UNet. Call unmount() first.")
        report = plan(model)
        require_match(report)
        modules_list = self.config["modules_list"]
        modules = {
            m["module_name"]: layer for m, layer in zip(modules_list, self.layers, strict=True)
        }
        require_fit(modules_list, report)
        require_usable(model, modules)
        added = kept = 0
        for name, layer in modules.items():
            original = model.get_submodule(name)
            device, dtype = placement(original)
            # A quantised parent has integer weights; its layers' own dtype is then the best guess.
            layer.to(device=device, dtype=dtype if dtype.is_floating_point else None)
            layer.train(original.training)
            layer.name = name
            if keep_original != "none":
                kept += sum(p.numel() * p.element_size() for p in own_parameters(original))
            added += sum(p.numel() for p in own_parameters(layer))
            added -= sum(p.numel() for p in own_parameters(original))
        left = tuple(
            replace(entry, target="", reason="not in this LinFusion's modules_list")
            for entry in report.swapped
            if entry.name not in modules
        )
        self._handle = swap_modules(
            model,
            modules,
            replace(
                report,
                swapped=tuple(entry for entry in report.swapped if entry.name in modules),
                skipped=report.skipped + left,
                added_parameters=added,
                kept_bytes=kept,
            ),
            keep_original=keep_original,
        )
        return self.report

    def fuse(self) -> None:
        """Makes every layer compute its projections by fewer and larger products, for inference.

        Exact but for rounding, mounted or not; the weights stay, in the same memory. Undone by
        `unfuse`, which is needed before training and before weights or LoRAs are loaded.

        Raises:
            AdapterError: If a LoRA is on the layers and not fused, or their weights are offloaded,
                cast for storage, or not all of one dtype and device.
        """
        for layer in self.layers:
            require_fusible(layer)
        for layer in self.layers:
            layer.fuse()

    def unfuse(self) -> None:
        """Undoes `fuse`: the layers compute as they are trained, from the same weights."""
        for layer in self.layers:
            layer.unfuse()

    def unmount(self) -> SwapReport:
        """Puts the UNet's own modules back, the very same objects; done twice, changes nothing.

        Raises:
            AdapterError: If it was never mounted, or if somebody else has replaced a layer since.
        """
        report = self.report
        assert self._handle is not None
        self._handle.unmount()
        return report

    def check(self, *args: Any, **kwargs: Any) -> list[LayerDrift]:
        """How far each layer's answer is from the softmax layer's, given the same inputs.

        Runs the UNet once, with softmax attention, and each layer beside the one it replaces.

        Args:
            *args, **kwargs: What the UNet is called with.

        Returns:
            One entry a layer: its name, tokens, relative error, and whether it is finite.

        Raises:
            AdapterError: If it was never mounted.
        """
        self.report  # noqa: B018 - raises if there is none
        assert self._handle is not None
        return self._handle.check(*args, **kwargs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Runs the block with the UNet's own softmax attention; mounted again afterwards."""
        with self._handle.disabled() if self._handle else nullcontext():
            yield
