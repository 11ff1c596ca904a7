"""CLIP (Radford et al. 2021): a vision transformer and a text transformer that meet in one embedding space.

Letters: B batch, N = 1 + P visual tokens ([CLS] + patches), T text positions, C width of a tower, E width of the
shared embedding. Blocks are pre-norm; QuickGELU as in OpenAI's models; every layer norm has eps 1e-5. Parameter names
are OpenAI's but for three things: blocks are `blocks`, not `transformer.resblocks`, the text tower's are below `text`,
and the attention keeps q, k and v as three linear layers, so that LoRA can wrap each (weights/clip_names.py).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class CLIPConfig:
    """The sizes of a CLIP; the defaults are those of ViT-B/16."""

    image_size: int = 224  # pixels, of both sides
    patch_size: int = 16  # P = (224 / 16)^2 = 196 patches
    vision_width: int = 768  # D_v of the HiVG paper
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512  # D_t
    text_layers: int = 12
    text_heads: int = 8
    embed_dim: int = 512  # E, where both towers meet
    context_length: int = 77  # the most text positions, start and end token included
    vocab_size: int = 49408


CLIP_SIZES = {
    # for the drawn worlds; its vocabulary is set when its merge table is learned
    "tiny": CLIPConfig(image_size=64, patch_size=8, vision_width=128, vision_layers=6, vision_heads=4,
                       text_width=128, text_layers=4, text_heads=4, embed_dim=128),
    "ViT-B/32": CLIPConfig(patch_size=32),
    "ViT-B/16": CLIPConfig(),
    "ViT-L/14": CLIPConfig(patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16,
                           text_width=768, text_heads=12, embed_dim=768),
    "ViT-L/14@336px": CLIPConfig(image_size=336, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16,
                                 text_width=768, text_heads=12, embed_dim=768),
}


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's approximation of GELU."""

    def forward(self, x):
        # with SiLU(y) = y sigmoid(y), which PyTorch has as one kernel
        return F.silu(1.702 * x) / 1.702


class MLP(nn.Module):
    """C -> hidden -> C with QuickGELU: the FFN of the blocks, of the bridge, and the head of RTCC."""

    def __init__(self, width, hidden):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = QuickGELU()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))  # (..., hidden)
        return self.c_proj(x)  # (..., C)


def to_autocast(x):
    """Cast x once to autocast's dtype; without autocast return x. Otherwise every matrix product that reads x would
    cast it again: q, k and v, each with its adapters, six times."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # autocast does not know "meta"
        return x
    return x.to(torch.get_autocast_dtype(kind))


def attend(q, k, v, mask, causal, dropout):
    """softmax(q k^T / sqrt(head_dim)) v of q (B, heads, N, head_dim) and k, v (B, heads, M, head_dim)."""
    if q.dtype != torch.bfloat16 or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
    # the same in float32: on a CPU its bfloat16 gradient takes six times as long
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, dropout, is_causal=causal)
    return y.to(q.dtype)


class Attention(nn.Module):
    """Multi-head attention: softmax(q k^T / sqrt(C / heads)) v.

    Self-attention in the towers and the grounding encoder; cross-attention in the bridge, whose queries are visual
    tokens and whose keys and values are text.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        # in CLIP's towers these four get Hi LoRA's adapters (lora.py)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def split_heads(self, x):
        """(B, N, C) -> (B, heads, N, C / heads)."""
        x = x.unflatten(-1, (self.heads, -1))  # (B, N, heads, C / heads)
        return x.transpose(1, 2)

    def project(self, query, key, value):
        """-> q (B, N, C), k and v (B, M, C)."""
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)

    def log_shares(self, query, key, mask=None):
        """Who looks at whom, as `forward` has it: the logarithm of the share of each query's attention that each key
        gets, (B, heads, N, M) float32."""
        q = self.split_heads(self.q_proj(query))  # (B, heads, N, C / heads)
        k = self.split_heads(self.k_proj(key))  # (B, heads, M, C / heads)
        with torch.autocast(q.device.type, enabled=False):  # it would make the product bfloat16 again
            logits = q.float() @ k.float().mT / q.shape[-1] ** 0.5  # (B, heads, N, M)
            if mask is not None:
                logits = logits.masked_fill(~mask, float("-inf"))
            return logits.log_softmax(-1)

    def forward(self, query, key=None, value=None, mask=None, causal=False, dropout=0.0):
        """query (B, N, C); key and value (B, M, C), by default the query (self-attention) and the key;
        mask bool, broadcast to (B, heads, N, M), True = may attend -> (B, N, C)."""
        query = to_autocast(query)
        key = query if key is None else to_autocast(key)
        value = key if value is None else to_autocast(value)
        q, k, v = [self.split_heads(x) for x in self.project(query, key, value)]  # (B, heads, N or M, C / heads)
        y = attend(q, k, v, mask, causal, dropout if self.training else 0.0)  # (B, heads, N, C / heads)
        y = y.transpose(1, 2).flatten(2)  # (B, heads, N, C / heads) -> (B, N, C)
        return self.out_proj(y)


class Block(nn.Module):
    """One pre-norm transformer block; in a ViT of HiVG some blocks run a bridge (bridge.py) in their middle."""

    def __init__(self, width, heads):
        super().__init__()
        # pre-norm: each branch reads a normalised copy of the stream x; x itself is only added to, from block to block
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x, causal=False, bridge=None, keys=None, is_key=None):
        """x (B, N, C) -> (B, N, C). bridge: a Bridge or None, with the text `keys` (B, T, C) it looks at, of which
        `is_key` (B, T) bool are no padding."""
        x = x + self.attn(self.ln_1(x), causal=causal)
        if bridge is not None:
            # the place the paper gives it: after the tokens have seen each other, before each is worked on alone
            x = bridge(x, keys, is_key)
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """CLIP's ViT."""

    # True: keep only what goes in and out of the blocks, and compute the rest again for the gradient: less memory, more
    # time. The presets of the large models set it.
    recompute = False

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width = config.vision_width
        patch = config.patch_size
        side = config.image_size // patch  # patches in a row
        # a convolution whose stride is its kernel is one linear map of each patch
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))
        self.positional_embedding = nn.Parameter(torch.empty(1 + side**2, width))
        if not self.positional_embedding.is_meta:  # else it has no values, and a file brings them
            self.positional_embedding.data.copy_(sine_positions(side, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([Block(width, config.vision_heads) for _ in range(config.vision_layers)])
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(nn.init.normal_(torch.empty(width, config.embed_dim), std=width**-0.5))

    def forward(self, images, bridges=None, keys=None, is_key=None):
        """images (B, 3, H, W), normalised, H and W multiples of the patch size -> the list of the hidden states
        (B, N, C) after each block.

        In HiVG, bridges {block, from "0": Bridge} run inside their blocks, each with its keys {block: (B, T, C)};
        is_key (B, T) bool, True = no padding, or None for no mask. One image may serve B texts: the hidden states are
        (1, N, C) before the first bridge and (B, N, C) after it.
        """
        bridges = {} if bridges is None else bridges
        x = self.conv1(images.to(self.conv1.weight.dtype))  # (B, C, H / patch, W / patch)
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, P, C), row by row
        cls = self.class_embedding.expand(len(x), 1, -1)  # (B, 1, C)
        x = torch.cat([cls, x], dim=1)  # (B, N, C)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, grid))

        hidden_states = []
        for number, block in enumerate(self.blocks):
            name = str(number)  # a ModuleDict, as HiVG keeps its bridges in, has strings for keys
            bridge = bridges[name] if name in bridges else None
            text = keys[name] if name in bridges else None  # (B, T, C)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, bridge=bridge, keys=text, is_key=is_key, use_reentrant=False)
            else:
                x = block(x, bridge=bridge, keys=text, is_key=is_key)  # (B, N, C)
            hidden_states.append(x)
        return hidden_states

    def project(self, x):
        """Last hidden state (B, N, C) -> (B, N, E)."""
        return self.ln_post(x) @ self.proj

    def pool(self, x):
        """Last hidden state (B, N, C) -> image embedding (B, E), not normalised: that of [CLS]."""
        return self.project(x[:, 0])


def sine_positions(side, width):
    """(1 + side^2, width): sines and cosines of a patch's row and column, zero for the class token.

    Ours; OpenAI's table starts at random. A small CLIP learns sooner if near patches look near from the start.
    """
    n = -(-width // 4)  # frequencies: a quarter of the channels, rounded up
    frequencies = 100 ** -(torch.arange(n) / n)  # (n), from a wave of 2 pi patches to one almost 100 times as long
    angles = torch.arange(side)[:, None] * frequencies  # (side, n)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, 2 n)
    rows = waves[:, None].expand(side, side, -1)  # (side, side, 2 n)
    columns = waves[None].expand(side, side, -1)  # (side, side, 2 n)
    patches = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (side^2, 4 n)
    patches = patches[:, :width]  # (side^2, width), where the width is no multiple of 4
    return F.pad(patches, (0, 0, 1, 0))  # (1 + side^2, width)


def resize_positions(table, grid):
    """Position table (1 + side^2, C), trained on a square grid -> (1 + h w, C) for grid (h, w): bicubic, antialiased,
    corners not aligned; the class token's row is kept."""
    side = round((len(table) - 1) ** 0.5)
    if tuple(grid) == (side, side):
        return table
    patches = table[1:].T.reshape(1, -1, side, side)  # (1, C, side, side)
    # in float32, as not every device interpolates bfloat16
    patches = F.interpolate(patches.float(), grid, mode="bicubic", antialias=True, align_corners=False)
    patches = patches.flatten(2)[0].T  # (h w, C)
    return torch.cat([table[:1], patches.to(table.dtype)])


class TextTransformer(nn.Module):
    """CLIP's text tower."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width = config.text_width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(nn.init.normal_(torch.empty(config.context_length, width), std=0.01))
        self.blocks = nn.ModuleList([Block(width, config.text_heads) for _ in range(config.text_layers)])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(nn.init.normal_(torch.empty(width, config.embed_dim), std=width**-0.5))

    def forward(self, token_ids):
        """token_ids (B, T) long, T <= context length -> the list of the hidden states (B, T, C) after each block,
        before the final layer norm: f^1 .. f^L of the HiVG paper."""
        T = token_ids.shape[1]
        x = self.token_embedding(token_ids)  # (B, T, C)
        x = x + self.positional_embedding[:T]  # (B, T, C): a text cut short uses the first positions
        hidden_states = []
        for block in self.blocks:
            # causal, so padding after the end token changes nothing before it, and needs no mask here
            x = block(x, causal=True)
            hidden_states.append(x)
        return hidden_states

    def project(self, x):
        """Last hidden state (B, T, C) -> (B, T, E)."""
        return self.ln_final(x) @ self.text_projection


def end_positions(token_ids):
    """(B, T) -> (B,): where each text ends. The end token has the largest id of the vocabulary, so it is found without
    knowing which id that is; what follows is padding, whatever its ids (0 is a real token too, "!")."""
    return token_ids.argmax(dim=-1)


def at_end_token(x, token_ids):
    """x (B, T, C) -> (B, C): the feature of the end token, which alone has seen the whole text."""
    end = end_positions(token_ids)[:, None, None]  # (B, 1, 1)
    return x.take_along_dim(end, dim=1)[:, 0]  # not x[row, end], whose gradient sorts the rows first


class CLIP(nn.Module):
    """The two towers, and the number that scales their similarity."""

    tokenizer = None  # the one that it was trained with, if there is a merge table

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)
        self.text = TextTransformer(config)
        # a logarithm, so that the scale stays positive; OpenAI's start, a temperature of 0.07
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.apply(init_module)
        init_residual_branches(self.visual.blocks, config.vision_width)
        init_residual_branches(self.text.blocks, config.text_width)
        for block in self.visual.blocks:
            # ours: with keys = queries a patch looks, to begin with, at what is alike and near
            nn.init.normal_(block.attn.q_proj.weight, std=(2 * config.vision_width) ** -0.5)
            block.attn.k_proj.weight.data.copy_(block.attn.q_proj.weight)

    def encode_image(self, images):
        """images (B, 3, H, W), normalised -> features (B, E), not normalised."""
        hidden_states = self.visual(images)  # each (B, N, C)
        return self.visual.pool(hidden_states[-1])

    def encode_text(self, token_ids):
        """token_ids (B, T) long -> features (B, E), not normalised."""
        hidden_states = self.text(token_ids)  # each (B, T, C)
        return at_end_token(self.text.project(hidden_states[-1]), token_ids)


def similarity(text_features, image_features, logit_scale):
    """(B_t, E) and (B_i, E) -> (B_t, B_i): the scaled cosine of every text with every image,

        S_ij = min(exp(logit_scale), 100) cos(t_i, v_j)
    """
    t = F.normalize(text_features, dim=-1)  # (B_t, E), of unit length: their products are cosines
    v = F.normalize(image_features, dim=-1)  # (B_i, E)
    return bounded_logit_scale(logit_scale) * t @ v.T


def bounded_logit_scale(logit_scale):
    """exp(logit_scale), held at 100 or less, as in CLIP: a larger one makes training unstable."""
    return logit_scale.exp().clamp(max=100)


def init_module(module):
    """OpenAI's initialisation of the text tower, here of both: a standard deviation of 1 / sqrt(C) for q, k and v, 1 /
    sqrt(2 C) for an MLP's first layer; biases zero (ours in the MLP)."""
    if isinstance(module, nn.Linear):
        # the first layer of an MLP has more outputs than inputs, so it starts smaller
        widens = module.out_features > module.in_features
        nn.init.normal_(module.weight, std=(module.in_features * (2 if widens else 1)) ** -0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def init_residual_branches(blocks, width):
    """As OpenAI in the text tower: the two branches that each block adds to the stream start smaller the more blocks
    there are, so that the stream's size does not depend on the depth."""
    std = width**-0.5 * (2 * len(blocks)) ** -0.5
    for block in blocks:
        nn.init.normal_(block.attn.out_proj.weight, std=std)
        nn.init.normal_(block.mlp.c_proj.weight, std=std)
