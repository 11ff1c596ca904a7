"""The cross-modal bridge: text steers a ViT block, between its self-attention residual and its MLP.

    s = fusion of the text layers' features                       (B, T, D_v), see fusion.py
    x = x + FFN(CrossAttention(LN(x), keys = values = s))         x (B, N, D_v), the ViT's visual tokens

The FFN's last layer starts at zero, so a new bridge is the identity and training starts from CLIP itself.
"""

import torch
import torch.nn as nn

from hivg.clip import MLP, Attention
from hivg.fusion import adaptive_fusion

KINDS = ("adaptive", "projected", "constant", "none")


class Bridge(nn.Module):
    """The bridge of one ViT block.

    kind "adaptive"   s is the adaptive fusion of the text layers (the paper)
         "projected"  s is given: the projected final text feature (the paper's mixed pre-training)
         "constant"   s is a learned constant instead of the text, to measure what the text is worth here
    """

    def __init__(self, kind, text_width, n_text_layers, vision_width, heads, context_length, text_norm=True):
        super().__init__()
        self.kind = kind
        if kind == "adaptive":
            shape = (n_text_layers, text_width)
            self.norm_weight = nn.Parameter(torch.ones(shape)) if text_norm else None
            self.norm_bias = nn.Parameter(torch.zeros(shape)) if text_norm else None
            self.adaptive_weights = nn.Parameter(torch.zeros(n_text_layers, context_length, text_width))
            self.proj = nn.Linear(n_text_layers * text_width, vision_width)
        elif kind == "constant":
            self.constant = nn.Parameter(0.02 * torch.randn(context_length, vision_width))
        self.ln = nn.LayerNorm(vision_width)
        self.attn = Attention(vision_width, heads)
        self.mlp = MLP(vision_width, 4 * vision_width)
        nn.init.zeros_(self.mlp.c_proj.weight)
        nn.init.zeros_(self.mlp.c_proj.bias)

    def keys(self, text_states, projected, mask):
        """What the visual tokens look at, which does not depend on the picture: text_states (K, B, T, D_t), projected
        (B, T, D_v) or None, mask (B, T) bool, True = text, or None for no mask (the released code) -> s (B, T, D_v) and
        the mask (B, 1, 1, T) over it."""
        if self.kind == "constant":
            return self.constant.expand(text_states.shape[1], -1, -1), None
        mask = None if mask is None else mask[:, None, None]
        if self.kind == "projected":
            return projected, mask
        T = text_states.shape[2]
        s = adaptive_fusion(text_states, self.adaptive_weights[:, :T], self.proj.weight, self.proj.bias,
                            self.norm_weight, self.norm_bias)
        return s, mask

    def forward(self, x, s, mask=None):
        """x (B, N, D_v), s and mask from `keys` -> (B, N, D_v)."""
        return x + self.mlp(self.attn(self.ln(x), s, mask=mask))
