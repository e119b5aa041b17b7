"""A step of LinFusion's distillation, as examples/distill.py takes it, but for its other losses.

Teacher and student are one frozen UNet in bfloat16, under autocast; the loss is the mean square of
the difference of their outputs, and only the linear attention layers, kept in float32, are trained,
by AdamW.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..replay import Replay
from ..timing import Call
from .attentions import Attentions
from .gate import FACTOR, Gate, precise, relative, require
from .models import UNETS, make_inputs, make_unet
from .rows import Row


class Training:
    """A row's UNet, its inputs, and the exact gradients to compare with."""

    missing = None

    def __init__(self, row: Row, device: str, gate: Gate) -> None:
        self.device, self.captured = device, row.mode == "train-graph" and device == "cuda"
        # So that its weights, and those of the layers, are the same numbers in float32.
        unet = make_unet(row.unet, device, torch.bfloat16).to(memory_format=torch.channels_last)
        self.attentions = Attentions(unet, UNETS[row.unet].mid_dim_scale)
        self.inputs = make_inputs(row.unet, row.px, row.batch, device, torch.float32)
        # One picture is enough to tell a wrong gradient.
        self.single = make_inputs(row.unet, row.px, 1, device, torch.float32)
        unet.float()
        with self._training("official"), precise():
            self.exact = self._gradients("official", autocast=False)
        unet.bfloat16()
        with self._training("official"):
            self.bound = FACTOR * relative(self._gradients("official"), self.exact)

    @contextmanager
    def ready(self, name: str) -> Iterator[tuple[Call, dict[str, float]]]:
        """A step with this attention, and its errors; raises `Wrong` where they are too large."""
        with self._training(name), _faster_convolutions():
            error = relative(self._gradients(name), self.exact)
            require("error of the gradients against float32", error, self.bound)
            step = self._step(name)
            call = Replay(step) if self.captured else step
            yield call, {"float32": error, "float32_bound": self.bound}

    @contextmanager
    def _training(self, name: str) -> Iterator[None]:
        layers = self.attentions.layers(name)
        with self.attentions.put_in(name, training=True):
            layers.float().requires_grad_(True)
            before = [p.detach().to("cpu", copy=True) for p in layers.parameters()]
            try:
                yield
            finally:
                layers.requires_grad_(False).zero_grad()
                # Ways share layers, and each is to start from the same weights.
                for parameter, weight in zip(layers.parameters(), before, strict=True):
                    parameter.copy_(weight)

    def _step(self, name: str) -> Call:
        parameters = list(self.attentions.layers(name).parameters())
        optimizer = torch.optim.AdamW(
            parameters,
            lr=1e-4,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=self.device == "cuda",
            capturable=self.captured,
        )

        def step() -> Tensor:
            loss = self._loss(name, self.inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    def _loss(self, name: str, inputs: dict, autocast: bool = True) -> Tensor:
        unet: Callable = self.attentions.unet
        # What autocast keeps for the next use would not be there in a replay.
        options = {"enabled": autocast, "cache_enabled": not self.captured}
        with torch.autocast(self.device, torch.bfloat16, **options):
            with torch.no_grad(), self.attentions.softmax(name):
                teacher = unet(**inputs, return_dict=False)[0]
            student = unet(**inputs, return_dict=False)[0]
            return F.mse_loss(student.float(), teacher.float())

    def _gradients(self, name: str, autocast: bool = True) -> Tensor:
        """All in one vector; both layers have their parameters in the same order."""
        parameters = list(self.attentions.layers(name).parameters())
        gradients = torch.autograd.grad(self._loss(name, self.single, autocast), parameters)
        return torch.cat([x.flatten() for x in gradients])


@contextmanager
def _faster_convolutions() -> Iterator[None]:
    """The settings of the example."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
