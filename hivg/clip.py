"""CLIP (Radford et al. 2021): a vision transformer and a text transformer that meet in one embedding space.

Letters: B batch, N = 1 + P visual tokens ([CLS] + patches), T text positions, C width of a tower, E width of the
shared embedding. Blocks are pre-norm; QuickGELU as in OpenAI's models; every layer norm has eps 1e-5. Parameter names
are OpenAI's, save that the attention keeps q, k and v as three linear layers, so that LoRA can wrap each.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class CLIPConfig:
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    embed_dim: int = 512
    context_length: int = 77
    vocab_size: int = 49408


CLIP_SIZES = {
    "tiny": CLIPConfig(64, 8, 128, 6, 4, 128, 4, 4, 128),  # for the bundled `shapes`; its vocabulary is set later
    "ViT-B/32": CLIPConfig(patch_size=32),
    "ViT-B/16": CLIPConfig(),
    "ViT-L/14": CLIPConfig(224, 14, 1024, 24, 16, 768, 12, 12, 768),
    "ViT-L/14@336px": CLIPConfig(336, 14, 1024, 24, 16, 768, 12, 12, 768),
}


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), written with SiLU(y) = y sigmoid(y), which PyTorch has as one kernel."""

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


class MLP(nn.Module):
    """C -> hidden -> C_out with QuickGELU."""

    def __init__(self, width, hidden, width_out=None):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = QuickGELU()
        self.c_proj = nn.Linear(hidden, width_out or width)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Attention(nn.Module):
    """Multi-head attention: softmax(q k^T / sqrt(C / heads)) v, of queries from one place to keys from any place."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query, key=None, value=None, mask=None, causal=False, dropout=0.0):
        """query (B, N, C); key and value (B, M, C), by default the query (self-attention) and the key;
        mask bool, broadcast to (B, heads, N, M), True = may attend -> (B, N, C)."""
        key = query if key is None else key
        value = key if value is None else value

        def split(x):  # (B, N, C) -> (B, heads, N, head_dim)
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q_proj(query)), split(self.k_proj(key)), split(self.v_proj(value))
        rate = dropout if self.training else 0.0
        if q.dtype == torch.bfloat16 and not q.is_cuda:  # its gradient takes six times as long as float32's on a CPU
            with torch.autocast(q.device.type, enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, rate, is_causal=causal)
            y = y.to(q.dtype)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, rate, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, heads, N, head_dim) -> (B, N, C)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x, causal=False, bridge=None):
        """x (B, N, C) -> (B, N, C). `bridge`, a function of x, runs between the attention residual and the MLP."""
        x = x + self.attn(self.ln_1(x), causal=causal)
        if bridge is not None:
            x = bridge(x)
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    checkpoint = False  # keep only what goes in and out of the blocks; the gradient computes the rest again

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, self.patch_size = config.vision_width, config.patch_size
        side = config.image_size // config.patch_size
        self.conv1 = nn.Conv2d(3, width, self.patch_size, stride=self.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(sine_positions(side, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([Block(width, config.vision_heads) for _ in range(config.vision_layers)])
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))

    def forward(self, images, bridges=None):
        """images (B, 3, H, W), normalised, H and W multiples of the patch size -> the list of the hidden states
        (B, N, C) after each block. `bridges` maps a block's number, from 0, to the function run inside it."""
        x = self.conv1(images)  # (B, C, H / patch, W / patch)
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, P, C)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, N, C)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, grid))
        hidden_states = []
        for number, block in enumerate(self.blocks):
            bridge = (bridges or {}).get(number)
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, bridge=bridge, use_reentrant=False)
            else:
                x = block(x, bridge=bridge)
            hidden_states.append(x)
        return hidden_states

    def project(self, x):
        """Last hidden state (B, N, C) -> (B, N, E)."""
        return self.ln_post(x) @ self.proj

    def pool(self, x):
        """Last hidden state (B, N, C) -> picture embedding (B, E), not normalised: that of [CLS]."""
        return self.project(x[:, 0])


def sine_positions(side, width):
    """(1 + side^2, width): sines and cosines of a patch's row and column, zero for the class token. A start at which
    near patches look near; training moves it freely."""
    n = -(-width // 4)
    angles = torch.arange(side)[:, None] * 100 ** -(torch.arange(n) / n)  # (side, n)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, 2 n)
    patches = torch.cat([waves[:, None].expand(side, side, -1), waves.expand(side, side, -1)], dim=-1)
    return F.pad(patches.flatten(0, 1)[:, :width], (0, 0, 1, 0))


def resize_positions(table, grid):
    """Position table (1 + side^2, C), trained on a square grid -> (1 + h w, C) for grid (h, w): bicubic, antialiased,
    corners not aligned; the class token's row is kept."""
    side = round((len(table) - 1) ** 0.5)
    if tuple(grid) == (side, side):
        return table
    patches = table[1:].T.reshape(1, -1, side, side)
    patches = F.interpolate(patches.float(), grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], patches.flatten(2)[0].T.to(table.dtype)])


class TextTransformer(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        width = config.text_width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList([Block(width, config.text_heads) for _ in range(config.text_layers)])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))

    def forward(self, token_ids):
        """token_ids (B, T) long, T <= context length -> the list of the hidden states (B, T, C) after each block,
        before the final layer norm. Causal, so what follows the end token changes nothing up to it."""
        x = self.token_embedding(token_ids) + self.positional_embedding[: token_ids.shape[1]]  # (B, T, C)
        hidden_states = []
        for block in self.blocks:
            x = block(x, causal=True)
            hidden_states.append(x)
        return hidden_states

    def project(self, x):
        """Last hidden state (B, T, C) -> (B, T, E)."""
        return self.ln_final(x) @ self.text_projection


def at_end_token(x, token_ids):
    """x (B, T, C) -> (B, C) at the end token, which has the largest id of the vocabulary."""
    return x[torch.arange(len(x), device=x.device), token_ids.argmax(dim=-1)]


class CLIP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)
        self.text = TextTransformer(config)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.apply(_init)
        for tower, width in ((self.visual, config.vision_width), (self.text, config.text_width)):
            for block in tower.blocks:  # OpenAI's init: residual branches shrink with the depth
                std = width**-0.5 * (2 * len(tower.blocks)) ** -0.5
                for linear in (block.attn.out_proj, block.mlp.c_proj):
                    nn.init.normal_(linear.weight, std=std)
        for block in self.visual.blocks:  # ours: with keys = queries a patch first looks at what is alike and near
            nn.init.normal_(block.attn.q_proj.weight, std=(2 * config.vision_width) ** -0.5)
            block.attn.k_proj.weight.data.copy_(block.attn.q_proj.weight)

    def encode_image(self, images, return_hidden_states=False):
        """images (B, 3, H, W), normalised -> features (B, E), not normalised; with the hidden states after each
        block, list of (B, N, C), when asked for."""
        hidden_states = self.visual(images)
        features = self.visual.pool(hidden_states[-1])
        return (features, hidden_states) if return_hidden_states else features

    def encode_text(self, token_ids, return_hidden_states=False):
        """token_ids (B, T) long -> features (B, E), not normalised; with the hidden states when asked for."""
        hidden_states = self.text(token_ids)
        features = at_end_token(self.text.project(hidden_states[-1]), token_ids)
        return (features, hidden_states) if return_hidden_states else features

    def forward(self, images, token_ids):
        """-> text features (B, E) and picture features (B, E), not normalised: what contrastive training needs."""
        return self.encode_text(token_ids), self.encode_image(images)

    def logits_per_text(self, images, token_ids):
        """-> (B_text, B_image): the scaled cosine of every text with every picture."""
        return similarity(*self(images, token_ids), self.logit_scale)


def similarity(text_features, image_features, logit_scale):
    """(B_t, E) and (B_i, E) -> the scaled cosine of every text with every picture (B_t, B_i)."""
    return bounded_logit_scale(logit_scale) * F.normalize(text_features, dim=-1) @ F.normalize(image_features, dim=-1).T


def bounded_logit_scale(logit_scale):
    """exp(logit_scale), held at 100 or less, as in CLIP."""
    return logit_scale.exp().clamp(max=100)


def _init(module):
    """OpenAI CLIP's initialisation: 1/sqrt(C) for what reads the stream, less for the MLP's first layer, no bias."""
    if isinstance(module, nn.Linear):
        widens = module.out_features > module.in_features
        nn.init.normal_(module.weight, std=(module.in_features * (2 if widens else 1)) ** -0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
