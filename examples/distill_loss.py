"""What LinFusion's distillation computes: a training example with noise, and its losses."""

import torch
import torch.nn.functional as F
from models import LinFusion
from torch import Tensor, nn


class Distillation(nn.Module):
    """The UNet as student and, LinFusion disabled, as teacher; its forward pass is the loss."""

    def __init__(self, unet: nn.Module, linfusion: LinFusion, compiled: bool) -> None:
        super().__init__()
        self.unet = unet
        self.as_teacher = linfusion.disabled
        self.outputs: list[Tensor] = []
        names = [layer["module_name"] for layer in linfusion.config["modules_list"]]
        with linfusion.disabled():
            originals = [unet.get_submodule(name) for name in names]
        for layer in (*originals, *linfusion.layers):
            layer.register_forward_hook(lambda _, __, output: self.outputs.append(output))
        if compiled:
            self.predict = torch.compile(self.predict, dynamic=False)

    def predict(self, *args, **kwargs) -> tuple[Tensor, list[Tensor]]:
        """The UNet's prediction, and the output of every attention layer in question."""
        self.outputs = []
        return self.unet(*args, **kwargs).sample, self.outputs

    def forward(self, noisy: Tensor, timestep: Tensor, target: Tensor, **condition) -> dict:
        """The losses, each a scalar: `total`, `task`, `prediction` and `attention`."""
        with torch.no_grad(), self.as_teacher():
            teacher, teacher_layers = self.predict(noisy, timestep, **condition)
        student, student_layers = self.predict(noisy, timestep, **condition)
        task = F.mse_loss(student.float(), target.float())
        prediction = F.mse_loss(student.float(), teacher.float())
        pairs = zip(student_layers, teacher_layers, strict=True)
        attention = torch.stack([F.mse_loss(s.float(), t.float()) for s, t in pairs]).mean()
        total = task + 0.5 * prediction + 0.5 * attention
        return {"total": total, "task": task, "prediction": prediction, "attention": attention}


def noised(batch: dict, blank: dict, scheduler, drop_captions: float) -> dict:
    """A training example out of an encoded batch: noise at random timesteps, captions dropped."""
    latents = batch["latents"].float()
    n, device = len(latents), latents.device
    noise = torch.randn_like(latents)
    timestep = torch.randint(scheduler.config.num_train_timesteps, (n,), device=device)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timestep)
    else:
        target = {"epsilon": noise, "sample": latents}[kind]
    dropped = torch.rand(n, device=device) < drop_captions
    text = torch.where(dropped[:, None, None], blank["text"], batch["text"].float())
    example = {
        "noisy": scheduler.add_noise(latents, noise, timestep),
        "timestep": timestep,
        "target": target,
        "encoder_hidden_states": text,
    }
    if "pooled" in batch:
        pooled = torch.where(dropped[:, None], blank["pooled"], batch["pooled"].float())
        added = {"text_embeds": pooled, "time_ids": batch["time_ids"].float()}
        example["added_cond_kwargs"] = added
    return example
