"""The learning rate, the optimizers, and the step they take together."""

import math

import torch

from hivg.lora import LoRALinear


def learning_rate(step, steps, peak, warmup_steps):
    """The rate of step `step` (from 0) of `steps`: a linear rise to `peak`, then half a cosine down to zero."""
    rise = min(1.0, (step + 1) / max(1, warmup_steps))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_optimizers(model, kind, weight_decay):
    """The optimizers of all trained parameters of a model, a list.

    kind: "adamw" for all parameters, as in the paper; or "muon" (Jordan et al. 2024), which makes the update of a
    matrix orthogonal, for the weights of linear layers and adapters, and AdamW for the rest. Muon's updates are scaled
    to the size of AdamW's, so both take the same learning rate.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        return [torch.optim.AdamW(trained, weight_decay=weight_decay, fused=True)]
    linear = set()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, LoRALinear)):
            linear.update(module.parameters())
    matrices = [p for p in trained if p in linear and p.ndim == 2]
    rest = [p for p in trained if p not in linear or p.ndim != 2]
    return [torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, weight_decay=weight_decay, fused=True)]


def set_learning_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def step_optimizers(optimizers):
    """One step of all; the gradients are cleared."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def check_finite(where, values, norm):
    """Raise ValueError if the loss or the norm of its gradient is not a finite number.

    where: the step in words. values: {name: scalar tensor} with "loss" and its terms. norm: scalar tensor.
    """
    if values["loss"].isfinite() and norm.isfinite():
        return
    terms = ", ".join(f"{name} {value.item():g}" for name, value in values.items() if name != "loss")
    raise ValueError(f"the loss is {values['loss'].item()} at {where} ({terms}), the norm of its gradient "
                     f"{norm.item():g}; the last state, from before that, is kept; try a lower --lr")
