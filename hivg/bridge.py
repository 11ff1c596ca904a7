"""The multi-layer adaptive cross-modal bridge: text steers a ViT block, between its self-attention and its MLP.

    f*^ml = fusion of the text layers' features                       (B, T, D_v), see fusion.py
    x     = x + FFN(CrossAttention(LN(x), keys = values = f*^ml))     x (B, N, D_v), the ViT's visual tokens

The FFN's last layer starts at zero, so a new bridge is the identity and training starts from CLIP itself.
(A gate of zero around that would leave gate and layer without a gradient: each is a factor of the other's.)
"""

import torch
import torch.nn as nn

from hivg.clip import MLP, Attention
from hivg.fusion import adaptive_fusion

KINDS = ("adaptive", "projected", "constant", "none")


class Bridge(nn.Module):
    """The bridge of one ViT block.

    kind "adaptive"   its keys are f*^ml, the adaptive fusion of the text layers (the paper)
         "projected"  its keys are given: the projected final text feature (the paper's mixed pre-training)
         "constant"   its keys are a learned constant instead of the text, to measure what the text is worth here
    """

    def __init__(self, kind, text_width, n_text_layers, vision_width, heads, context_length, text_norm=True):
        super().__init__()
        self.kind = kind
        if kind == "adaptive":
            # Ours (`text_norm`): a layer norm for each text layer. The released code concatenates them raw, so the
            # largest can drown the others.
            shape = (n_text_layers, text_width)
            self.norm_weight = nn.Parameter(torch.ones(shape)) if text_norm else None
            self.norm_bias = nn.Parameter(torch.zeros(shape)) if text_norm else None
            # zero, so f*^i is f^i, normed, at the start; the released code starts them as N(0, 1)
            self.adaptive_weights = nn.Parameter(torch.zeros(n_text_layers, context_length, text_width))
            self.proj = nn.Linear(n_text_layers * text_width, vision_width)
        elif kind == "constant":
            self.constant = nn.Parameter(nn.init.normal_(torch.empty(context_length, vision_width), std=0.02))
        self.ln = nn.LayerNorm(vision_width)
        self.attn = Attention(vision_width, heads)
        self.mlp = MLP(vision_width, 4 * vision_width)
        # FFN(..) = 0 at the start, so the bridge returns x unchanged
        nn.init.zeros_(self.mlp.c_proj.weight)
        nn.init.zeros_(self.mlp.c_proj.bias)

    def keys(self, text_states, projected=None):
        """The text that the visual tokens look at: text_states (K, B, T, D_t), projected (B, T, D_v), for its kind
        -> (B, T, D_v), where T is the whole context length for "constant". It does not depend on the image, so it is
        made once, before the ViT starts."""
        K, B, T, D_t = text_states.shape
        if self.kind == "projected":
            return projected
        if self.kind == "constant":
            return self.constant.expand(B, -1, -1)  # (B, context length, D_v)
        weights = self.adaptive_weights[:, :T]  # (K, T, D_t): one row a position, so short texts use the first ones
        return adaptive_fusion(text_states, weights, self.proj.weight, self.proj.bias,
                               self.norm_weight, self.norm_bias)  # f*^ml (B, T, D_v)

    def forward(self, x, keys, is_key=None, attention=None):
        """x (B, N, D_v), or (1, N, D_v) where B texts are about one image; keys (B, T, D_v), is_key (B, T) bool, False
        on padding, or None for no mask (the released code) -> (B, N, D_v).

        attention: None, or a list to append (B, N, T) float32 to: how each visual token shares its attention among the
        keys, the mean over the heads.
        """
        x = x.expand(len(keys), -1, -1)  # (B, N, D_v): up to the first bridge one image is the same for all texts
        if is_key is None or self.kind == "constant":  # a constant has no padding
            mask = None
        else:
            mask = is_key[:, None, None]  # (B, 1, 1, T): the same for every head and every visual token
        y = self.ln(x)
        attended = self.attn(y, keys, mask=mask)  # CrossAttention(LN(x), f*^ml): (B, N, D_v)
        if attention is not None:
            attention.append(self.attn.log_shares(y, keys, mask).exp().mean(1))  # of (B, heads, N, T)
        return x + self.mlp(attended)  # x + FFN(CrossAttention(LN(x), f*^ml))
