"""HiVG: CLIP's two towers, the cross-modal bridge between them, a grounding encoder and its heads.

Letters: B batch, T text positions, P patches, N = 1 + P visual tokens ([CLS] first), D_t and D_v widths of the towers,
E width of CLIP's shared embedding, D width of the grounding encoder.
"""

from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from hivg import lora
from hivg.boxes import cxcywh_to_xyxy
from hivg.bridge import KINDS, Bridge
from hivg.clip import CLIP, MLP, Attention, CLIPConfig, at_end_token, similarity

# vision layers of the CLIP -> blocks with a bridge (counted from 0), visual levels (counted from 1)
LAYERS = {
    6: ((1, 3, 5), (1, 2, 4, 6)),  # tiny
    12: ((0, 3, 7, 11), (1, 4, 8, 12)),  # ViT-B
    24: ((4, 10, 16, 22), (6, 12, 18, 24)),  # ViT-L
}


@dataclass(frozen=True)
class HiVGConfig:
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    bridge: str = "adaptive"  # or projected, constant, none
    bridge_blocks: tuple = LAYERS[12][0]
    text_layers: tuple = (12,)  # whose features the bridge fuses, counted from 1
    text_norm: bool = True  # layer norm on each of them; the released code has none
    visual_levels: tuple = LAYERS[12][1]
    level_norm: bool = True  # layer norm, without parameters, on each of them; the released code has none
    width: int = 512  # of the grounding encoder
    encoder_layers: int = 6
    encoder_heads: int = 8
    encoder_ffn: int = 2048
    rtcc_hidden: int = 3072  # hidden width of the head that projects the visual tokens for the token map
    dropout: float = 0.1  # in the grounding encoder
    lora: str = "hierarchical"  # or shared, vanilla, none
    lora_rank: int = 32
    lora_alpha: float = 16
    lora_dropout: float = 0.1
    lora_groups: int = 3  # of the vision tower; the text tower is one group
    stage: int = 0  # Hi LoRA stages whose adapters are in place; 0 = warm-up
    normalization: str = "clip"  # mean and std of the pictures: clip, or imagenet (released checkpoints)
    text_padding: str = "masked"  # or released: all positions are keys in the bridge, those of id 0 none in the encoder

    def __post_init__(self):
        if self.bridge not in KINDS:
            raise ValueError(f"bridge must be one of {', '.join(KINDS)}, not {self.bridge!r}")
        if self.lora not in lora.MODES:
            raise ValueError(f"lora must be one of {', '.join(lora.MODES)}, not {self.lora!r}")
        if self.text_padding not in ("masked", "released"):
            raise ValueError(f"text_padding must be masked or released, not {self.text_padding!r}")

    @classmethod
    def for_clip(cls, clip: CLIPConfig, **changes):
        """The paper's layer numbers for a CLIP of this depth; `changes` are fields of this class."""
        if clip.vision_layers not in LAYERS:
            raise ValueError(f"no bridge blocks and visual levels are known for a ViT of {clip.vision_layers} layers; "
                             f"known: {', '.join(map(str, LAYERS))}")
        blocks, levels = LAYERS[clip.vision_layers]
        settings = dict(bridge_blocks=blocks, visual_levels=levels, text_layers=(clip.text_layers,))
        if clip.vision_layers == 6:
            settings.update(text_layers=(2, 4), width=128, encoder_layers=4, encoder_heads=4, encoder_ffn=512,
                            rtcc_hidden=256, dropout=0.0, lora_dropout=0.0)  # unlimited data: nothing to regularise
        return cls(clip=clip, **(settings | changes))

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, d):
        d = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
        return cls(**(d | {"clip": CLIPConfig(**d["clip"])}))


@dataclass
class HiVGOutput:
    boxes: torch.Tensor  # (B, 4) cxcywh in 0..1 of the padded square
    token_similarity: torch.Tensor | None  # (B, P) logits: does the patch belong to the region? (RTCC)
    mask_logits: torch.Tensor | None  # (B, 1, 8 h, 8 w) for a patch grid of (h, w)
    logits_per_text: torch.Tensor  # (B, B) scaled cosine of every expression with every picture (CLC)
    text_features: torch.Tensor  # (B, E) pooled, not normalised
    image_features: torch.Tensor  # (B, E)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer; the position embedding joins the queries and keys only (as in DETR)."""

    def __init__(self, width, heads, ffn, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.rate, self.dropout = dropout, nn.Dropout(dropout)

    def forward(self, x, position, mask):
        """x (B, M, D), position (M, D), mask (B, 1, 1, M), True = may be attended to -> (B, M, D)."""
        y = self.norm1(x)
        x = x + self.dropout(self.attn(y + position, y + position, y, mask=mask, dropout=self.rate))
        y = self.dropout(F.relu(self.linear1(self.norm2(x))))
        return x + self.dropout(self.linear2(y))


class HiVG(nn.Module):
    """The grounding model. CLIP's own weights are frozen from the start, and only they."""

    def __init__(self, config: HiVGConfig):
        super().__init__()
        self.config = config
        clip, D = config.clip, config.width
        self.clip = CLIP(clip).requires_grad_(False)
        blocks = () if config.bridge == "none" else config.bridge_blocks
        self.bridges = nn.ModuleDict({
            str(l): Bridge(config.bridge, clip.text_width, len(config.text_layers), clip.vision_width,
                           clip.vision_heads, clip.context_length, config.text_norm) for l in blocks})
        if config.bridge == "projected":
            self.bridge_text_proj = nn.Linear(clip.embed_dim, clip.vision_width)
        self.levels_proj = nn.Linear(len(config.visual_levels) * clip.vision_width, clip.embed_dim)
        self.visual_proj = nn.Linear(clip.embed_dim, D)
        self.text_proj = nn.Linear(clip.embed_dim, D)
        n_visual = 1 + (clip.image_size // clip.patch_size) ** 2
        self.reg_token = nn.Parameter(torch.randn(D))
        self.position = nn.Parameter(torch.randn(1 + n_visual + clip.context_length, D))  # [REG], visual, text
        self.encoder = nn.ModuleList([EncoderLayer(D, config.encoder_heads, config.encoder_ffn, config.dropout)
                                      for _ in range(config.encoder_layers)])
        self.encoder_norm = nn.LayerNorm(D)
        self.box_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 4))
        self.rtcc_norm = nn.LayerNorm(D)
        self.rtcc_mlp = MLP(D, config.rtcc_hidden, D)
        self.mask_convs = nn.ModuleList([nn.ConvTranspose2d(D, D, 2, stride=2, bias=False) for _ in range(3)])
        for layer in self.encoder:
            for linear in (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj, layer.attn.out_proj,
                           layer.linear1, layer.linear2):
                nn.init.xavier_uniform_(linear.weight)  # as DETR and TransVG start theirs
                nn.init.zeros_(linear.bias)
        for stage in range(1, config.stage + 1):
            self.add_stage(stage)

    @classmethod
    def from_clip(cls, clip: CLIP, config: HiVGConfig):
        """A model at the start of its training: CLIP's weights, and the visual levels' projection as CLIP's own
        visual projection, repeated once a level."""
        model = cls(config)
        model.clip.load_state_dict(clip.state_dict())
        with torch.no_grad():
            model.levels_proj.weight.copy_(clip.visual.proj.T.repeat(1, len(config.visual_levels)))
            model.levels_proj.bias.zero_()
        return model

    def add_stage(self, stage):
        """Begin Hi LoRA stage `stage` (1, 2, ..): new adapters in place, the earlier ones frozen (lora.py)."""
        c = self.config
        for tower, groups in ((self.clip.visual, c.lora_groups), (self.clip.text, 1)):
            lora.add_stage(tower.blocks, stage, groups, c.lora_rank, c.lora_alpha, c.lora_dropout, c.lora)
        self.config = replace(c, stage=stage)

    def with_bridge(self, kind):
        """A new model with fresh bridges of this kind beside all there is in this one, which has none."""
        model = HiVG(replace(self.config, bridge=kind)).requires_grad_(False)
        fresh = {k: v for k, v in model.state_dict().items() if k.startswith(("bridges.", "bridge_text_proj."))}
        model.load_state_dict(fresh | self.state_dict())
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith("clip."))
        return model.train(self.training)

    def merged(self):
        """A new model with the adapters folded into CLIP's weights and the same output; this one is unchanged."""
        model = lora.merge(self)
        model.config = replace(self.config, lora="none", stage=0)
        return model

    @staticmethod
    def score(output, grid):
        """How far the box and the token map of an output agree: (B,) in 0..1, not calibrated. The box covers a share
        c of each patch of the (h, w) grid, the map gives it a probability p: sum min(p, c) / sum max(p, c)."""
        (h, w), (xmin, ymin, xmax, ymax) = grid, cxcywh_to_xyxy(output.boxes.float()).unbind(-1)

        def overlap(low, high, n):  # (B,) in 0..1 -> (B, n): the share of each of n cells that lies in low..high
            left = torch.arange(n, device=low.device) / n
            return (torch.minimum(high[:, None], left + 1 / n) - torch.maximum(low[:, None], left)).clamp(min=0) * n

        c = (overlap(ymin, ymax, h)[:, :, None] * overlap(xmin, xmax, w)[:, None]).flatten(1)  # (B, P)
        p = output.token_similarity.float().sigmoid()
        return torch.minimum(p, c).sum(1) / torch.maximum(p, c).sum(1)

    def forward(self, images, padding_mask, token_ids, with_rtcc=True, with_mask=True):
        """images (B, 3, S, S) normalised letterboxes, padding_mask (B, S, S) bool, True = padding, token_ids (B, T)
        long -> HiVGOutput. with_rtcc and with_mask: whether to compute these heads."""
        c = self.config
        if images.shape[-2:] != (c.clip.image_size,) * 2:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels; this model takes squares of "
                             f"{c.clip.image_size}, see Letterbox")
        if c.text_padding == "released":
            token_ids = F.pad(token_ids, (0, c.clip.context_length - token_ids.shape[1]))
            is_key, is_text = None, token_ids != 0  # also "!" in an expression is taken for padding
        else:
            token_ids = token_ids[:, : int(token_ids.argmax(-1).max()) + 1]  # cut to the longest: only the time changes
            is_text = torch.arange(token_ids.shape[1], device=images.device) <= token_ids.argmax(-1, keepdim=True)
            is_key = is_text  # (B, T)

        text_states = self.clip.text(token_ids)  # f^1 .. f^L, each (B, T, D_t)
        text = self.clip.text.project(text_states[-1])  # (B, T, E)
        visual_states = self.clip.visual(images, self.bridge_functions(text_states, text, is_key))

        levels = [visual_states[l - 1] for l in c.visual_levels]
        if c.level_norm:  # the stream grows with the depth: unnormed, the places that shallow levels know are drowned
            levels = [F.layer_norm(x, x.shape[-1:]) for x in levels]
        levels = torch.cat(levels, dim=-1)  # (B, N, levels * D_v)
        visual = self.visual_proj(self.levels_proj(levels))  # (B, N, D)
        grid = [side // c.clip.patch_size for side in images.shape[-2:]]
        padded = F.interpolate(padding_mask[:, None].float(), grid, mode="bilinear", antialias=True) > 0.5
        is_visual = F.pad(~padded.flatten(1), (1, 0), value=True)  # (B, N): [CLS] is never padding
        reg, patches, words = self.encode(visual, self.text_proj(text), is_visual, is_text)

        end = F.normalize(at_end_token(words, token_ids), dim=-1)  # (B, D)
        text_features, image_features = at_end_token(text, token_ids), self.clip.visual.pool(visual_states[-1])
        with torch.autocast(reg.device.type, enabled=False):  # in bfloat16 a coordinate would be a multiple of 1/256
            boxes = self.box_head(reg.to(self.position.dtype)).sigmoid()
        return HiVGOutput(
            boxes=boxes,
            token_similarity=self.rtcc(patches, end) if with_rtcc else None,
            mask_logits=self.mask_head(patches, end, grid) if with_mask else None,
            logits_per_text=similarity(text_features, image_features, self.clip.logit_scale),
            text_features=text_features, image_features=image_features)

    def bridge_functions(self, text_states, text, is_key):
        """What each bridged ViT block runs, as {block: function of x}; all that depends on the text alone is done here,
        once, before the ViT starts."""
        used = torch.stack([text_states[i - 1] for i in self.config.text_layers])  # (K, B, T, D_t)
        projected = self.bridge_text_proj(text) if self.config.bridge == "projected" else None

        def steer(bridge):
            s, mask = bridge.keys(used, projected, is_key)
            return lambda x: bridge(x, s, mask)

        return {int(l): steer(bridge) for l, bridge in self.bridges.items()}

    def encode(self, visual, text, is_visual, is_text):
        """Grounding encoder over [REG], visual (B, N, D) and text (B, T, D) tokens; is_visual (B, N) and is_text (B, T)
        are False on padding -> [REG] (B, D), patches (B, P, D), words (B, T, D)."""
        B, N, T = len(visual), visual.shape[1], text.shape[1]
        x = torch.cat([self.reg_token.expand(B, 1, -1), visual, text], dim=1)  # (B, 1 + N + T, D)
        mask = F.pad(torch.cat([is_visual, is_text], dim=1), (1, 0), value=True)[:, None, None]  # (B, 1, 1, 1 + N + T)
        position = self.position[: 1 + N + T]
        for layer in self.encoder:
            x = layer(x, position, mask)
        x = self.encoder_norm(x)
        return x[:, 0], x[:, 2 : 1 + N], x[:, 1 + N :]

    def rtcc(self, patches, end):
        """RTCC: patches (B, P, D), end token of unit length (B, D) -> logits (B, P)."""
        return torch.einsum("bpd,bd->bp", self.rtcc_mlp(self.rtcc_norm(patches)), end)

    def mask_head(self, patches, end, grid):
        """Three 2x transposed convolutions of the patches, dotted with the end token -> logits (B, 1, 8 h, 8 w).

        Nothing stands between the convolutions, so the whole is linear in the patches: the end token is pulled through
        the three kernels first, which leaves one 8 x 8 kernel a sample. Same numbers, some 40 times fewer products.
        """
        w1, w2, w3 = (conv.weight for conv in self.mask_convs)  # each (D_in, D_out, 2, 2)
        k = torch.einsum("cdyx,bd->bcyx", w3, end)  # (B, D, 2, 2)
        for w in (w2, w1):  # the outer kernel's pixel (Y, X) holds the inner kernel's pixels (y, x)
            k = torch.einsum("cdYX,bdyx->bcYyXx", w, k).flatten(4, 5).flatten(2, 3)  # sides double: 4, then 8
        (h, w), side = grid, k.shape[-1]
        logits = torch.einsum("bpd,bdyx->bpyx", patches, k).unflatten(1, (h, w))  # (B, h, w, 8, 8)
        return logits.permute(0, 1, 3, 2, 4).reshape(-1, 1, h * side, w * side)
