"""Copies of a model that compute the same in fewer calls: `training_copy` to train, `HiVG.for_prediction` to predict.

A call costs a GPU some microseconds however small it is, and a training step makes thousands. In these copies

- the weights of matrix products are in the products' dtype: the frozen ones converted when the copy is made, the
  trained ones in one call, at each forward. Autocast alone converts each where it is used;
- self-attention in CLIP's towers makes q, k and v in one product, of frozen weights into which the earlier stages'
  adapters are folded;
- QuickGELU's two factors are part of the frozen weights around it.
"""

import copy

import torch
import torch.nn as nn

from hivg.clip import MLP, Attention, Block, QuickGELU
from hivg.lora import JoinedLoRA, LoRALinear, linear_of


def training_copy(model, dtype, together=True):
    """A copy of a HiVG that shares its trained parameters, for the training of one stage. The model stays as it is.

    Make it anew after `add_stage`, after freezing or unfreezing, and after loading weights; it has the model's mode.

    dtype: autocast's, or float32 for none. together: whether to convert the trained weights in one call; with several
    processes autocast does it, one by one, so that each gradient is averaged while the backward goes on.
    """
    # its modules are new, its parameters the same, and so are buffers, if somebody's extension has any
    fast = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    simplify(fast)
    if dtype == torch.float32:
        return fast
    trained = {}  # {(module, name): parameter}
    for module, name in weights_of_products(fast):
        p = getattr(module, name)
        if p.requires_grad:
            trained[module, name] = p
        else:
            setattr(module, name, nn.Parameter(p.to(dtype), requires_grad=False))

    def convert(*_):
        for (module, name), converted in zip(trained, Convert.apply(dtype, *trained.values())):
            module.__dict__[name] = converted  # found before the parameter of this name, which stays registered

    if together:
        fast.register_forward_pre_hook(convert)
    return fast


def weights_of_products(model):
    """The weights and biases of a HiVG's matrix products as pairs (module, name), but for the box head's, which stay in
    float32."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, LoRALinear, JoinedLoRA)
    found = [(model.clip.visual, "proj"), (model.clip.text, "text_projection")]
    for path, module in model.named_modules():
        if isinstance(module, kinds) and not path.startswith("box_head"):
            for part in module.modules():  # an adapter's A and B are modules of their own, lists of parameters
                found += [(part, name) for name, _ in part.named_parameters(recurse=False)]
    return found


class Convert(torch.autograd.Function):
    """float32 tensors -> copies in another dtype, and their gradients back, each way in one call for all of them."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)  # what is in no loss gets no gradient
        copies = [torch.empty_like(x, dtype=dtype) for x in tensors]
        torch._foreach_copy_(copies, tensors)
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients):
        known = [g for g in gradients if g is not None]
        copies = [torch.empty_like(g, dtype=torch.float32) for g in known]
        torch._foreach_copy_(copies, known)
        copies = iter(copies)
        return None, *[None if g is None else next(copies) for g in gradients]


def simplify(model):
    """Join the self-attentions' products and fold QuickGELU's factors, in place, wherever the weights are frozen.

    Somebody's extension of these modules stays as it is. But hooks on a block's attention, or within its MLP, are lost;
    those on blocks, bridges and the model are kept.
    """
    for module in list(model.modules()):
        if isinstance(module, Block) and type(module.attn) is Attention:  # exactly: an extension's computes otherwise
            layers = list(module.attn.children())
            if {type(layer) for layer in layers} <= {nn.Linear, LoRALinear} and not is_trained(layers):
                module.attn = JoinedAttention(module.attn)
        elif type(module) is MLP and type(module.gelu) is QuickGELU:
            layers = [module.c_fc, module.c_proj]
            if {type(layer) for layer in layers} == {nn.Linear} and not is_trained(layers):
                fold_gelu(module)


def is_trained(layers):
    """Whether a weight or bias of these layers is trained; adapters beside them may be."""
    return any(p.requires_grad for layer in layers for p in (layer.weight, layer.bias))


class JoinedAttention(Attention):
    """A self-attention with frozen weights, whose q, k and v are one product: `qkv`, C -> 3 C."""

    def __init__(self, attn):
        nn.Module.__init__(self)  # not Attention's, which makes layers
        self.heads = attn.heads
        self.qkv = join([attn.q_proj, attn.k_proj, attn.v_proj])
        self.out_proj = join([attn.out_proj])

    def project(self, query, key, value):
        """-> q, k and v (B, N, C) of the query, which is also key and value."""
        return self.qkv(query).chunk(3, dim=-1)


def join(layers):
    """n frozen linear layers of the same input as one, with their trained adapters if they have any."""
    if any(p.requires_grad for layer in layers for p in layer.parameters()):
        return JoinedLoRA(layers)
    weights = [layer.folded() if isinstance(layer, LoRALinear) else layer.weight for layer in layers]
    return linear_of(torch.cat(weights), torch.cat([layer.bias for layer in layers])).requires_grad_(False)


def fold_gelu(mlp):
    """QuickGELU(h) = SiLU(1.702 h) / 1.702: with the factors in the weights before and after it, SiLU is left."""
    mlp.c_fc = linear_of(1.702 * mlp.c_fc.weight, 1.702 * mlp.c_fc.bias).requires_grad_(False)
    mlp.c_proj = linear_of(mlp.c_proj.weight / 1.702, mlp.c_proj.bias).requires_grad_(False)
    mlp.gelu = nn.SiLU()
