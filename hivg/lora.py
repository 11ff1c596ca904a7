"""Hi LoRA: low-rank adapters added in stages, from the shallow layers to the deep ones.

Layers 1..L of a tower are cut in G groups. In stage j every layer l <= j L/G gets a NEW pair (A_j, B_j), and the
pairs of earlier stages stay in place, frozen:

    h_j^l = W_0 x                                              l >  j L/G
    h_j^l = W_0 x + (alpha/r) sum_{k = ceil(l G/L) .. j} B_k A_k x     l <= j L/G

so a shallow layer ends with G pairs and the deepest group with one. The other modes, for comparison:

    shared    one pair a layer; stage j adds it to the layers l <= j L/G that lack it and trains all there are
              (what the released program does)
    vanilla   all layers get their pair in stage 1, the only one
    none      no adapters
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

MODES = ("hierarchical", "shared", "vanilla", "none")
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # the attention's four projections, nothing else


class LoRALinear(nn.Module):
    """A frozen linear layer W_0 with any number of low-rank pairs beside it.

        h = W_0 x + b + (alpha/r) sum_k B_k A_k dropout(x)

    A_k (r, in) starts Kaiming-uniform and B_k (out, r) at zero, so a new pair changes nothing until it is trained.
    The keys of W_0 stay `weight` and `bias`, so wrapping a layer does not rename it.
    """

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.scale, self.dropout = rank, alpha / rank, dropout
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.stages = []  # the stage that brought each pair
        self.train(linear.training)

    def add_pair(self, stage):
        """Freeze the pairs there are and add a new, trainable one."""
        for p in self.parameters():
            p.requires_grad_(False)
        out_features, in_features = self.weight.shape
        A = torch.empty(self.rank, in_features, device=self.weight.device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # the init of nn.Linear, as in the LoRA paper's code
        self.A.append(nn.Parameter(A))
        self.B.append(nn.Parameter(torch.zeros(out_features, self.rank, device=self.weight.device)))
        self.stages.append(stage)

    def forward(self, x):
        h = F.linear(x, self.weight, self.bias)  # (..., in) -> (..., out)
        # sum_k B_k A_k x = [B_1 .. B_j] [A_1; ..; A_j] x: two products however many stages there were
        A, B = torch.cat(list(self.A)), torch.cat(list(self.B), dim=1)  # (j r, in), (out, j r)
        return h + self.scale * F.linear(F.linear(F.dropout(x, self.dropout, self.training), A), B)

    def merged(self):
        """A plain nn.Linear with the same output: W_0 + (alpha/r) sum_k B_k A_k. This module is left as it is."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias=self.bias is not None, device="meta")
        update = sum((B.double() @ A.double() for A, B in zip(self.A, self.B)), torch.tensor(0.0))
        weight = (self.weight.double() + self.scale * update).to(self.weight.dtype)  # summed in float64, rounded once
        linear.weight = nn.Parameter(weight.detach())
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return linear.requires_grad_(self.weight.requires_grad).train(self.training)


def adapted_layers(stage, n_layers, groups, mode="hierarchical"):
    """The layers, counted from 1, whose adapters stage `stage` trains: those with l <= stage * n_layers / groups."""
    if mode not in MODES:
        raise ValueError(f"lora must be one of {', '.join(MODES)}, not {mode!r}")
    if stage < 1 or mode == "none" or (mode == "vanilla" and stage > 1):
        return []
    last = n_layers if mode == "vanilla" else min(stage * n_layers // groups, n_layers)
    return list(range(1, last + 1))


def add_stage(blocks, stage, groups, rank=32, alpha=16, dropout=0.1, mode="hierarchical"):
    """Give the transformer blocks (a list of modules with an `attn`) the adapters of one stage, in place.

    Call it for stage 1, 2, .. in turn. Afterwards exactly the pairs that this stage trains have requires_grad.
    """
    for module in blocks.modules():
        if isinstance(module, LoRALinear):
            for p in module.parameters():
                p.requires_grad_(False)
    for l in adapted_layers(stage, len(blocks), groups, mode):
        attn = blocks[l - 1].attn
        for name in TARGETS:
            linear = getattr(attn, name)
            if not isinstance(linear, LoRALinear):
                linear = LoRALinear(linear, rank, alpha, dropout)
                setattr(attn, name, linear)
            if mode == "shared" and linear.stages:
                linear.A[0].requires_grad_(True), linear.B[0].requires_grad_(True)
            else:
                linear.add_pair(stage)


def merge(module):
    """A copy of `module` with every LoRALinear replaced by the plain linear it amounts to; `module` is unchanged."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())
    return module
