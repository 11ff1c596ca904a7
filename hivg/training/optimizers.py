"""The learning rate, the optimizers, and the step they take together."""

import math

import torch

from hivg.lora import LoRALinear
from hivg.utils.cli import choose_dtype


def learning_rate(step, steps, peak, warmup_steps):
    """The rate of step `step` (from 0) of `steps`: half a cosine from `peak` down to zero, times a linear rise over the
    first `warmup_steps`, at most half of all."""
    rise = min(1.0, (step + 1) / max(1, min(warmup_steps, steps // 2)))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): the momentum of a matrix is made nearly orthogonal before it is subtracted.

    The numbers of torch.optim.Muon, but in float32 where bfloat16 is slow. Matrices of one shape are orthogonalised
    together, as a batch: adapters are many small matrices, and one by one they cost more in calls than in arithmetic.
    The step is scaled to the size of AdamW's (Liu et al. 2025), so that both take the same learning rate.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.0, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for matrices in by_shape.values():
                self.step_together(matrices, group)

    def step_together(self, matrices, group):
        """One step of n matrices of one shape (rows, columns)."""
        for p in matrices:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in matrices]
        gradients = [p.grad for p in matrices]
        # _foreach: on a GPU one kernel for all of them
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's look ahead
        updates = orthogonalise(torch.stack(updates))  # (n, rows, columns); of tall matrices a transposed view
        # contiguous, or _foreach_add_ adds them one by one; without `copy`, float32 would stay a transposed view
        updates = updates.to(matrices[0].dtype, memory_format=torch.contiguous_format, copy=True)
        # an orthogonal update has a root mean square of 1 / sqrt(longer side); AdamW's is about 0.2
        scale = 0.2 * max(matrices[0].shape) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(-group["lr"] * scale * updates))  # the rate may be a tensor


def orthogonalise(x, steps=5):
    """The nearest matrices whose singular values are all about 1, by Newton-Schulz iterations with the coefficients of
    Jordan et al.: (n, rows, columns) -> the same in bfloat16, or in float32 where bfloat16 is slow."""
    x = x.to(choose_dtype("auto", x.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the products are of the shorter side
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(model, kind, weight_decay, rate_of=None):
    """The optimizers of all trained parameters of a model, a list.

    kind: "adamw" for all parameters, as in the paper; or "muon" (Jordan et al. 2024), which makes the update of a
    matrix orthogonal, for the weights of linear layers and adapters, and AdamW for the rest. Muon's updates are scaled
    to the size of AdamW's, so both take the same learning rate. rate_of: {parameter: its share of the learning rate},
    1 for those that are not in it.
    """
    rate_of = rate_of or {}

    def groups(parameters):
        by_rate = {}
        for p in parameters:
            by_rate.setdefault(rate_of.get(p, 1.0), []).append(p)
        return [{"params": parameters, "rate": rate} for rate, parameters in by_rate.items()]

    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        return [torch.optim.AdamW(groups(trained), weight_decay=weight_decay, fused=True)]
    matrices = set()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, LoRALinear)):
            matrices.update(p for p in module.parameters() if p.ndim == 2)
    return [Muon(groups(p for p in trained if p in matrices), weight_decay=weight_decay),
            torch.optim.AdamW(groups(p for p in trained if p not in matrices), weight_decay=weight_decay, fused=True)]


def set_learning_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr * group["rate"])  # where a recorded step reads it (graph.py)
            else:
                group["lr"] = lr * group["rate"]


def step_optimizers(optimizers):
    """One step of all; the gradients are cleared."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def clip_and_step(model, optimizers, clip_grad):
    """Clip the gradients to the norm `clip_grad` and step -> their norm before, a scalar tensor."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    step_optimizers(optimizers)
    return norm


class Diverged(ValueError):
    """The loss or its gradient is no longer finite."""


def check_finite(where, values):
    """Raise Diverged if the loss or the norm of its gradient is not finite. A GPU has to wait for them.

    where: the step in words. values: {name: scalar tensor} with "loss", its terms, and "gradient_norm".
    """
    values = dict(values)
    loss = values.pop("loss")
    norm = values.pop("gradient_norm")
    if loss.isfinite() and norm.isfinite():
        return
    terms = ", ".join(f"{name} {value.item():g}" for name, value in values.items())
    raise Diverged(f"the loss is {loss.item()} at {where} ({terms}), the norm of its gradient {norm.item():g}; "
                   "train again under another --name with a lower --lr")
