"""Hi LoRA: low-rank adapters added in stages, from the shallow layers to the deep ones.

Layers 1..L of a tower are cut into G groups. In stage j every layer l <= j L/G gets a NEW pair (A_j, B_j), and the
pairs of earlier stages stay in place, frozen:

    h_j^l = W_0 x                                                      l >  j L/G
    h_j^l = W_0 x + (alpha/r) sum_{k = ceil(l G/L) .. j} B_k A_k x     l <= j L/G

so a shallow layer ends with G pairs and the deepest group with one. The paper's reason for the order: the deep layers
compute on what the shallow ones see, so errors of perception add up with the depth unless the shallow layers are
adapted first.

The layers that a stage trains (`adapted_layers`), in ViT-B, L = 12 and G = 3, and in its text tower, L = 12 and G = 1:

    stage       1       2       3
    vision      1-4     1-8     1-12
    text        1-12    1-12    1-12

Nothing else of CLIP is trained, unless train.py's --clip_rate is set; the bridges, the grounding encoder and heads are
trained in every stage.

The other modes, for comparison (`lora` of the configuration):

    shared    one pair per layer; stage j adds it to the layers l <= j L/G that lack it and trains all pairs there are
              (as the released program, whose stages take the first 5, 8 and 12 layers, even where there are 24)
    vanilla   all layers get their pair in stage 1, the only one
    none      no adapters

and the other orders of the vision layers (`lora_order`): deep_first, stage j adapts those with l > L - j L/G;
at_once, every stage adapts all of them.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

MODES = ("hierarchical", "shared", "vanilla", "none")
ORDERS = ("shallow_first", "deep_first", "at_once")
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # the attention's four projections, nothing else
TEXT_GROUPS = 1  # the text tower is one group: all its layers are adapted from stage 1


class LoRALinear(nn.Module):
    """A frozen linear layer W_0 with any number of low-rank pairs beside it.

        h = W_0 x + b + (alpha/r) sum_k B_k A_k dropout(x)

    A_k (r, in) starts Kaiming-uniform and B_k (out, r) at zero, so a new pair changes nothing until it is trained.
    The keys of W_0 stay `weight` and `bias`, so wrapping a layer does not rename it. A subclass with a `forward` of its
    own is merged only if it has its own `folded` or `merged`, too.
    """

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.rank = rank
        self.scale = alpha / rank  # so that the size of the update does not grow with the rank
        self.dropout = dropout
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()
        self.stages = []  # the stage that brought each pair
        self.train(linear.training)

    def add_pair(self, stage):
        """Freeze the pairs there are and add a new, trainable one."""
        self.requires_grad_(False)  # W_0, b and the pairs of earlier stages
        out_features, in_features = self.weight.shape
        A = torch.empty(self.rank, in_features, device=self.weight.device, dtype=self.weight.dtype)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # the init of nn.Linear, as in the LoRA paper's code
        B = A.new_zeros(out_features, self.rank)  # so B A = 0, and the output stays
        self.A.append(nn.Parameter(A))
        self.B.append(nn.Parameter(B))
        self.stages.append(stage)

    def forward(self, x):
        """(..., in) -> (..., out)."""
        h = F.linear(x, self.weight, self.bias)  # W_0 x + b
        # sum_k B_k A_k = [B_1 .. B_j] [A_1; ..; A_j], so two products do for any number of stages
        A = torch.cat(list(self.A))  # (j r, in)
        B = torch.cat(list(self.B), dim=1)  # (out, j r)
        x = F.dropout(x, self.dropout, self.training)  # on the adapters' input only; W_0 sees all of x
        return h + F.linear(self.scale * F.linear(x, A), B)  # scaled where it is smallest, (..., j r)

    def folded(self, frozen_only=False):
        """W_0 + (alpha/r) sum_k B_k A_k, (out, in), over all pairs or over the frozen ones alone."""
        weight = self.weight.detach().double()  # summed in float64, so that it is rounded once
        update = torch.zeros_like(weight)
        for A, B in zip(self.A, self.B):
            if not (frozen_only and A.requires_grad):
                update = update + B.detach().double() @ A.detach().double()  # (out, r) (r, in) -> (out, in)
        return (weight + self.scale * update).to(self.weight.dtype)

    def merged(self):
        """A plain nn.Linear with the same output. This module is left as it is."""
        linear = linear_of(self.folded(), None if self.bias is None else self.bias.clone())
        linear.requires_grad_(self.weight.requires_grad)  # a frozen layer stays frozen
        return linear.train(self.training)


def linear_of(weight, bias):
    """An nn.Linear of this weight (out, in) and bias (out) or None."""
    out_features, in_features = weight.shape
    # on "meta" there is no memory and no random start for numbers that are replaced at once
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


class JoinedLoRA(nn.Module):
    """n adapted layers of one input x as one, while a stage trains one pair (A_i, B_i) of each:

        h_i = W_i x + b_i + (alpha/r) B_i A_i dropout(x)        W_i = W_0,i + (alpha/r) sum of layer i's frozen B_k A_k

    LoRALinear is the definition, and this is the same but for dropout, of which the paper gives no more than the rate:
    a frozen pair is part of W_i, which sees all of x as W_0,i does, and the n layers share one mask.
    """

    def __init__(self, layers):
        """layers: n LoRALinear of one size. Frozen weights are copied, the trained pairs are shared."""
        super().__init__()
        self.scale = layers[0].scale
        self.dropout = layers[0].dropout
        weight = torch.cat([layer.folded(frozen_only=True) for layer in layers])  # (n out, in)
        bias = torch.cat([layer.bias for layer in layers])  # (n out)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.A = nn.ParameterList([A for layer in layers for A in layer.A if A.requires_grad])  # (r, in) each
        self.B = nn.ParameterList([B for layer in layers for B in layer.B if B.requires_grad])  # (out, r) each
        self.train(layers[0].training)

    def forward(self, x):
        """(..., in) -> (..., n out); M rows in all."""
        A = torch.cat(list(self.A)) if len(self.A) > 1 else self.A[0]  # (n r, in)
        B = torch.stack(list(self.B)) if len(self.B) > 1 else self.B[0][None]  # (n, out, r)
        h = AddUpdate.apply(x.flatten(0, -2), self.weight, self.bias, A.to(x.dtype), B.to(x.dtype), self.scale,
                            self.dropout if self.training else 0.0)  # (M, n out)
        return h.unflatten(0, x.shape[:-1])


class AddUpdate(torch.autograd.Function):
    """h_i = W_i x + b_i + s B_i u_i for i = 1..n, with u_i = A_i z and z = dropout(x): x (M, in), W (n out, in), b (n
    out), A (n r, in), B (n, out, r), s and the dropout's rate -> h (M, n out). W and b are frozen.

    Written by hand so that each sum is one call, a product added to what is already there; autograd would compute the
    product, and then add it. With d_y the derivative of the loss with respect to y, for one row of x as a column:

        d_u_i = s B_i^T d_h_i       d_B_i = s d_h_i u_i^T       d_A = d_u z^T
        d_x = W^T d_h + A^T d_u, the latter with the mask of z
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B, s, rate):
        h = F.linear(x, W, b)  # (M, n out)
        z, kept = torch.native_dropout(x, rate, True) if rate else (x, None)
        u = F.linear(z, A)  # (M, n r)
        parts(h, B).baddbmm_(parts(u, B), B.mT, alpha=s)
        ctx.save_for_backward(W, A, B, z, u, kept)
        ctx.s = s
        ctx.rate = rate
        return h

    @staticmethod
    def backward(ctx, d_h):
        W, A, B, z, u, kept = ctx.saved_tensors
        d_u = torch.empty_like(u)  # filled as a view of n parts; with beta=0 what is there counts for nothing
        parts(d_u, B).baddbmm_(parts(d_h, B), B, beta=0, alpha=ctx.s)
        d_B = torch.baddbmm(B, parts(d_h, B).mT, parts(u, B), beta=0, alpha=ctx.s)
        d_A = d_u.T @ z
        d_x = None
        if ctx.needs_input_grad[0]:  # not where the text tower begins
            d_x = d_h @ W
            if kept is None:
                d_x.addmm_(d_u, A)
            else:
                d_x.addcmul_(d_u @ A, kept, value=1 / (1 - ctx.rate))
        return d_x, None, None, d_A, d_B, None, None


def parts(x, B):
    """(M, n c) -> (n, M, c), the n layers' parts, as a view that torch.compile can write to. B: (n, ..)."""
    c = x.shape[-1] // len(B)
    return x.as_strided((len(B), len(x), c), (c * x.stride(1), *x.stride()))


def adapted_layers(stage, n_layers, groups, mode="hierarchical", order="shallow_first"):
    """The layers, counted from 1, whose adapters stage `stage` trains: those with l <= stage * n_layers / groups.

    groups: of the tower; `lora_groups` of the configuration for vision, TEXT_GROUPS for text. Stage 0 is the warm-up,
    without adapters. Raises ValueError for a mode that is none of MODES.
    """
    if mode not in MODES:
        raise ValueError(f"lora must be one of {', '.join(MODES)}, not {mode!r}")
    if mode == "none":
        last = 0
    elif mode == "vanilla":
        last = n_layers if stage == 1 else 0
    else:
        # the largest l with l <= j L/G; the text tower, of one group, has all its layers from stage 1
        last = min(stage * n_layers // groups, n_layers)
    if order == "at_once" and last:
        last = n_layers
    if order == "deep_first":
        return list(range(n_layers - last + 1, n_layers + 1))
    return list(range(1, last + 1))


def without_adapters(model):
    """The parameters of a model but for the A and B of its adapters, a list."""
    adapters = set()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            adapters.update(module.A, module.B)
    return [p for p in model.parameters() if p not in adapters]


def add_stage(blocks, stage, groups, rank=32, alpha=16, dropout=0.1, mode="hierarchical", order="shallow_first"):
    """Give the transformer blocks (a ModuleList of modules with an `attn`) the adapters of one stage, in place.

    Call it for stage 1, 2, .. in turn. Afterwards exactly the pairs that this stage trains have requires_grad.
    """
    for module in blocks.modules():
        if isinstance(module, LoRALinear):
            module.requires_grad_(False)  # what earlier stages trained

    for layer in adapted_layers(stage, len(blocks), groups, mode, order):
        attn = blocks[layer - 1].attn
        for name in TARGETS:
            linear = getattr(attn, name)
            if not isinstance(linear, LoRALinear):  # the first pair of this layer
                linear = LoRALinear(linear, rank, alpha, dropout)
                setattr(attn, name, linear)
            if mode == "shared" and linear.stages:
                # the one pair of an earlier stage, trained on
                linear.A[0].requires_grad_(True)
                linear.B[0].requires_grad_(True)
            else:
                linear.add_pair(stage)


def merge(module):
    """A copy of `module` with every LoRALinear replaced by the plain linear it amounts to, but for those of somebody's
    own of which that is not known; `module` is unchanged."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):  # lists, as the modules are replaced meanwhile
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                kind = type(child)
                is_known = (kind.forward is LoRALinear.forward or kind.folded is not LoRALinear.folded
                            or kind.merged is not LoRALinear.merged)
                setattr(parent, name, child.merged() if is_known else child)
    return module
