"""HiVG: CLIP's two towers, the cross-modal bridge between them, a grounding encoder and its heads.

Letters: B batch, T text positions, P patches, N = 1 + P visual tokens ([CLS] first), D_t and D_v widths of the towers,
E width of CLIP's shared embedding, D width of the grounding encoder, M = 1 + N + T its tokens ([REG] first).

    expression --> text tower --------------------> text tokens ----+
                       |  bridges: f*^ml                            +--> grounding encoder --> box, RTCC, mask
    image -------> ViT ------> several levels ----> visual tokens --+
                                                                         (CLC compares the ends of the two towers)

Read `HiVG.forward` first: it is this figure, line by line.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from hivg import lora
from hivg.boxes import box_on_grid
from hivg.bridge import KINDS, Bridge
from hivg.clip import CLIP, MLP, Attention, CLIPConfig, at_end_token, end_positions, similarity
from hivg.fast import simplify

# vision layers of the CLIP -> blocks with a bridge (counted from 0), visual levels (counted from 1)
LAYERS = {
    6: ((1, 3, 5), (1, 2, 4, 6)),  # tiny
    12: ((0, 3, 7, 11), (1, 4, 8, 12)),  # ViT-B
    24: ((4, 10, 16, 22), (6, 12, 18, 24)),  # ViT-L
}


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer; the position embedding joins the queries and keys only (as in DETR)."""

    def __init__(self, width, heads, ffn, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.linear1 = nn.Linear(width, ffn)
        self.linear2 = nn.Linear(ffn, width)
        self.rate = dropout
        self.dropout = nn.Dropout(dropout)

    def init_weights(self):
        """Xavier-uniform, W ~ U(-b, b) with b = sqrt(6 / (in + out)); biases are zero."""
        for linear in (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj):
            # as in DETR, TransVG and the released code q, k and v are one matrix, (3 D, D): b = sqrt(6 / (D + 3 D))
            nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)
            nn.init.zeros_(linear.bias)
        for linear in (self.attn.out_proj, self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)  # ours for the last two: there they keep the small random ones of nn.Linear

    def reg_attention(self, x, position, mask):
        """Attention of the first token, [REG], in this layer, as `forward` has it: x (B, M, D) -> the logarithm of the
        share that each token gets of it, (B, heads, M)."""
        y = self.norm1(x) + position
        return self.attn.log_shares(y[:, :1], y, mask)[:, :, 0]

    def forward(self, x, position, mask):
        """x (B, M, D), position (M, D), mask (B, 1, 1, M), True = may be attended to -> (B, M, D)."""
        y = self.norm1(x)
        # where a token is decides what it looks at, and is no part of what it tells the others
        y = self.attn(y + position, value=y, mask=mask, dropout=self.rate)
        x = x + self.dropout(y)
        y = self.dropout(F.relu(self.linear1(self.norm2(x))))  # (B, M, ffn)
        return x + self.dropout(self.linear2(y))


@dataclass
class HiVGOutput:
    """A prediction for each of B pairs of image and expression."""

    boxes: torch.Tensor  # (B, 4) cxcywh in 0..1 of the padded square
    token_similarity: torch.Tensor  # (B, P) logits: does the patch belong to the region? (RTCC)
    mask_logits: torch.Tensor | None  # (B, 1, 8 h, 8 w) for a patch grid of (h, w)
    # (B, B) scaled cosine of every expression with every image (CLC). With a bridge this is no retrieval score: image j
    # has read expression j, and repeats it
    logits_per_text: torch.Tensor
    text_features: torch.Tensor  # (B, E) pooled, not normalised
    image_features: torch.Tensor  # (B, E)
    patch_boxes: torch.Tensor | None = None  # (B, P, 4) the box head applied to every patch, on request
    reg_attention: torch.Tensor | None = None  # (2, B, heads, P) log of [REG]'s attention in two layers, on request
    bridge_attention: dict | None = None  # {block, from "0": (B, N, T), see `Bridge.forward`}, on request


@dataclass(frozen=True)
class HiVGConfig:
    """All settings of a HiVG; they are stored in its weights file. Raises ValueError for unknown names and layers."""

    clip: CLIPConfig = field(default_factory=CLIPConfig)
    bridge: str = "adaptive"  # or projected, constant, none
    bridge_blocks: tuple = LAYERS[12][0]
    text_layers: tuple = (12,)  # whose features the bridge fuses, counted from 1
    text_norm: bool = True  # layer norm on each of them; the released code has none
    visual_levels: tuple = LAYERS[12][1]
    level_norm: bool = True  # layer norm, without parameters, on each of them; the released code has none
    width: int = 512  # D, of the grounding encoder
    encoder_layers: int = 6
    encoder_heads: int = 8
    encoder_ffn: int = 2048
    rtcc_hidden: int = 3072  # hidden width of the MLP that projects the patches for RTCC
    dropout: float = 0.1  # in the grounding encoder
    lora: str = "hierarchical"  # or shared, vanilla, none
    lora_rank: int = 32
    lora_alpha: float = 16
    lora_dropout: float = 0.1
    lora_groups: int = 3  # G, of the vision tower; the text tower is one group. train.py has stages for 3
    lora_order: str = "shallow_first"  # or deep_first, at_once (lora.ORDERS)
    stage: int = 0  # Hi LoRA stages whose adapters are in place; 0 = warm-up
    normalization: str = "clip"  # mean and std of the images: clip, or imagenet (released checkpoints)
    text_padding: str = "masked"  # or released: the bridge masks nothing, the encoder all ids 0, see `find_text`

    def __post_init__(self):
        for name, known in (("bridge", KINDS), ("lora", lora.MODES), ("lora_order", lora.ORDERS),
                            ("normalization", ("clip", "imagenet")),  # data.transforms.NORMALIZATION
                            ("text_padding", ("masked", "released"))):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r:.60}")
        self.check_layers("text_layers", 1, self.clip.text_layers)
        self.check_layers("visual_levels", 1, self.clip.vision_layers)
        self.check_layers("bridge_blocks", 0, self.clip.vision_layers - 1)

    def check_layers(self, name, first, last):
        layers = getattr(self, name)
        for layer in layers:
            if not first <= layer <= last:
                raise ValueError(f"{name} must be from {first} to {last} for this CLIP, not {layer}")
        if len(set(layers)) < len(layers):
            raise ValueError(f"{name} must be different numbers, not {layers!r:.60}")
        if not layers and name != "bridge_blocks":
            raise ValueError(f"{name} must name a layer")

    def adapted_layers(self, stage):
        """The layers of the vision and of the text tower, counted from 1, whose adapters a stage of Hi LoRA trains."""
        return (lora.adapted_layers(stage, self.clip.vision_layers, self.lora_groups, self.lora, self.lora_order),
                lora.adapted_layers(stage, self.clip.text_layers, lora.TEXT_GROUPS, self.lora, self.lora_order))

    @classmethod
    def for_clip(cls, clip: CLIPConfig, **changes):
        """The paper's layer numbers for a CLIP of this depth; `changes` are fields of this class. Raises ValueError
        for a depth that the paper has no numbers for."""
        if clip.vision_layers not in LAYERS:
            raise ValueError(f"no bridge blocks and visual levels are known for a ViT of {clip.vision_layers} layers; "
                             f"known: {', '.join(map(str, LAYERS))}; add yours to LAYERS in hivg/model.py")
        blocks, levels = LAYERS[clip.vision_layers]
        settings = dict(bridge_blocks=blocks, visual_levels=levels, text_layers=(clip.text_layers,))
        settings |= dict(width=clip.embed_dim)  # as the released models: 512 on ViT-B, 768 on ViT-L
        if clip.vision_layers == 6:  # tiny
            settings |= dict(text_layers=(2, 4), encoder_layers=4, encoder_heads=4, encoder_ffn=512, rtcc_hidden=256)
            settings |= dict(dropout=0.0, lora_dropout=0.0)  # the drawn data has no end: nothing to regularise
        return cls(clip=clip, **(settings | changes))

    def with_lora(self, mode, rank, alpha):
        """The configuration for `add_stage` to add adapters to a model that has none. Raises ValueError if it has."""
        if self.stage:
            raise ValueError(f"the model has adapters already ({self.lora}, stage {self.stage}); leave out --lora")
        return replace(self, lora=mode, lora_rank=rank, lora_alpha=alpha)

    @classmethod
    def from_dict(cls, settings):
        """From `dataclasses.asdict`, also after it has been through JSON, which makes lists of tuples."""
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        settings["clip"] = CLIPConfig(**settings["clip"])
        return cls(**settings)


class HiVG(nn.Module):
    """The grounding model. At first only CLIP's own weights are frozen; `add_stage` freezes the older adapters too.

    To see the towers' hidden states in a forward, hook `clip.visual` or `clip.text`. Called by themselves, without the
    bridges, `clip.visual(images)` and `clip.encode_image` read no text.
    """

    tokenizer = None  # the one that CLIP was trained with, if there is a merge table

    def __init__(self, config: HiVGConfig):
        super().__init__()
        self.config = replace(config, stage=0)  # `add_stage` counts up
        clip = config.clip
        D = config.width
        self.clip = CLIP(clip).requires_grad_(False)
        self.side = clip.image_size // clip.patch_size  # of the square of patches

        self.bridges = nn.ModuleDict()  # {block of the ViT, from "0": Bridge}
        bridge_blocks = () if config.bridge == "none" else config.bridge_blocks
        for block in bridge_blocks:
            self.bridges[str(block)] = Bridge(config.bridge, clip.text_width, len(config.text_layers),
                                              clip.vision_width, clip.vision_heads, clip.context_length,
                                              config.text_norm)
        if config.bridge == "projected" and self.bridges:
            self.bridge_text_proj = nn.Linear(clip.embed_dim, clip.vision_width)

        # from the towers' widths to the encoder's
        self.levels_proj = nn.Linear(len(config.visual_levels) * clip.vision_width, clip.embed_dim)
        self.visual_proj = nn.Linear(clip.embed_dim, D)
        self.text_proj = nn.Linear(clip.embed_dim, D)

        # grounding encoder
        n_visual = 1 + self.side**2  # N
        self.reg_token = nn.Parameter(nn.init.normal_(torch.empty(D)))
        M = 1 + n_visual + clip.context_length  # [REG], visual, text
        self.position = nn.Parameter(nn.init.normal_(torch.empty(M, D)))
        self.encoder = nn.ModuleList()
        for _ in range(config.encoder_layers):
            self.encoder.append(EncoderLayer(D, config.encoder_heads, config.encoder_ffn, config.dropout))
        self.encoder_norm = nn.LayerNorm(D)

        # heads
        self.box_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 4))
        self.rtcc_norm = nn.LayerNorm(D)
        self.rtcc_mlp = MLP(D, config.rtcc_hidden)
        self.mask_convs = nn.ModuleList([nn.ConvTranspose2d(D, D, 2, stride=2, bias=False) for _ in range(3)])

        for layer in self.encoder:
            layer.init_weights()
        for stage in range(1, config.stage + 1):
            self.add_stage(stage)

    @classmethod
    def from_clip(cls, clip: CLIP, config: HiVGConfig):
        """A model at the start of its training: CLIP's weights, and the visual levels' projection as CLIP's own
        visual projection, repeated once a level, so that the encoder starts from their sum in CLIP's space."""
        model = cls(config)
        model.clip.load_state_dict(clip.state_dict())
        model.tokenizer = clip.tokenizer
        with torch.no_grad():
            # (D_v, E) -> (E, levels * D_v)
            model.levels_proj.weight.copy_(clip.visual.proj.T.repeat(1, len(config.visual_levels)))
            model.levels_proj.bias.zero_()
        return model

    def forward(self, images, padding_mask, token_ids, with_mask=True, with_patch_boxes=False,
                with_reg_attention=False, with_bridge_attention=False):
        """images (B, 3, S, S) normalised letterboxes, padding_mask (B, S, S) bool, True = padding, token_ids (B, T)
        long -> HiVGOutput. One image, (1, 3, S, S) with (1, S, S), may go with B texts: whatever does not depend on
        the text is then computed once. with_*: whether the output has these fields. Raises ValueError for another S."""
        B = len(token_ids)
        size = self.config.clip.image_size
        if images.shape[-2:] != (size, size):
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels; this model takes squares of {size}, see "
                             "Letterbox")
        grid = (self.side, self.side)  # of the patches

        # Text tower: f^1 .. f^L, and the last one in CLIP's shared space
        token_ids, is_text, is_key = self.find_text(token_ids)
        text_states = self.clip.text(token_ids)  # (B, T, D_t) after each block
        text = self.clip.text.project(text_states[-1])  # (B, T, E)

        # Bridges: the fused text f*^ml that the visual tokens will look at, for each block that has a bridge
        keys = self.bridge_keys(text_states, text)  # {block: (B, T, D_v)}

        # ViT: the bridges run inside their blocks
        bridges = self.bridges
        seen = {block: [] for block in bridges}  # what each bridge reads
        if with_bridge_attention:
            bridges = {block: partial(bridge, attention=seen[block]) for block, bridge in bridges.items()}
        visual_states = self.clip.visual(images, bridges, keys, is_key)
        visual_states = [x.expand(B, -1, -1) for x in visual_states]  # (B, N, D_v) after each block

        # Multi-level visual features
        visual = self.visual_proj(self.join_levels(visual_states))  # (B, N, D)

        # Grounding encoder: [REG], visual and text tokens attend to each other
        is_visual = self.find_visual(padding_mask, grid).expand(B, -1)  # (B, N)
        attention = [] if with_reg_attention else None
        reg, patches, words = self.encode(visual, self.text_proj(text), is_visual, is_text, attention)

        # Heads: the box comes from [REG]; RTCC and the mask compare the patches with the end token, which has seen the
        # whole expression
        end = F.normalize(at_end_token(words, token_ids), dim=-1)  # (B, D), of unit length
        boxes = self.box(reg)  # (B, 4)
        token_similarity = self.rtcc(patches, end)  # (B, P)
        mask_logits = self.mask_head(patches, end, grid) if with_mask else None  # (B, 1, 8 h, 8 w)

        # CLC: every expression of the batch against every image, at the ends of the two towers
        text_features = at_end_token(text, token_ids)  # (B, E)
        image_features = self.clip.visual.pool(visual_states[-1])  # (B, E)
        logits_per_text = similarity(text_features, image_features, self.clip.logit_scale)  # (B, B)
        output = HiVGOutput(boxes, token_similarity, mask_logits, logits_per_text, text_features, image_features)
        if with_patch_boxes:
            output.patch_boxes = self.box(patches)  # (B, P, 4)
        if with_reg_attention:
            output.reg_attention = torch.stack(attention)  # (2, B, heads, P)
        if with_bridge_attention:
            output.bridge_attention = {block: shares for block, (shares,) in seen.items()}
        return output

    def find_text(self, token_ids):
        """token_ids (B, T) -> token_ids (B, T), is_text (B, T) bool for the encoder, and is_key (B, T) bool for the
        bridge, both True up to the end token; is_key is None if the bridge masks nothing. Padding costs time alone: the
        tokenizer adds no more than the longest text needs."""
        if self.config.text_padding == "released":
            # always 77 positions, all of them keys of the bridge; the encoder masks id 0 wherever it stands, also where
            # it is a real token ("!")
            token_ids = F.pad(token_ids, (0, self.config.clip.context_length - token_ids.shape[1]))  # (B, 77)
            return token_ids, token_ids != 0, None
        position = torch.arange(token_ids.shape[1], device=token_ids.device)  # (T,)
        is_text = position <= end_positions(token_ids)[:, None]  # (B, T)
        return token_ids, is_text, is_text

    @staticmethod
    def find_visual(padding_mask, grid):
        """padding_mask (B, S, S) bool -> (B, N) bool, True = no padding: about half of the patch or more is image."""
        share = F.interpolate(padding_mask[:, None].float(), grid, mode="bilinear", antialias=True)  # (B, 1, h, w)
        padded = (share > 0.5).flatten(1)  # (B, P)
        return F.pad(~padded, (1, 0), value=True)  # (B, N): [CLS] is never padding

    def bridge_keys(self, text_states, text):
        """The text that each bridge lets its ViT block look at: text_states f^1 .. f^L, each (B, T, D_t), and text
        (B, T, E), the last one projected -> {block, from "0": (B, T, D_v)}."""
        levels = torch.stack([text_states[layer - 1] for layer in self.config.text_layers])  # (K, B, T, D_t)
        projected = None
        if self.config.bridge == "projected" and self.bridges:
            projected = self.bridge_text_proj(text)  # (B, T, D_v), the same for every bridge
        return {block: bridge.keys(levels, projected) for block, bridge in self.bridges.items()}

    def join_levels(self, visual_states):
        """Multi-level visual features: hidden states after each block, (B, N, D_v) each -> (B, N, E)."""
        levels = []
        for layer in self.config.visual_levels:
            x = visual_states[layer - 1]
            if self.config.level_norm:
                # ours: the stream grows with the depth, and would drown what the shallow levels know of places
                x = F.layer_norm(x, x.shape[-1:])
            levels.append(x)
        return self.levels_proj(torch.cat(levels, dim=-1))  # (B, N, levels * D_v) -> (B, N, E)

    def encode(self, visual, text, is_visual, is_text, attention=None):
        """Grounding encoder over [REG], visual (B, N, D) and text (B, T, D) tokens; is_visual (B, N) and is_text (B, T)
        are False on padding -> [REG] (B, D), patches (B, P, D), words (B, T, D).

        attention: None, or a list to append [REG]'s attention to the patches to, (B, heads, P) in each of the last two
        layers.
        """
        B, N, D = visual.shape
        reg = self.reg_token.expand(B, 1, -1)  # (B, 1, D)
        x = torch.cat([reg, visual, text], dim=1)  # (B, M, D)
        mask = torch.cat([is_visual, is_text], dim=1)  # (B, N + T)
        mask = F.pad(mask, (1, 0), value=True)[:, None, None]  # (B, 1, 1, M): [REG] is never padding
        position = self.position[: x.shape[1]]  # (M, D): text comes last, so short texts leave the end unused
        for number, layer in enumerate(self.encoder):
            if attention is not None and number >= len(self.encoder) - 2:
                attention.append(layer.reg_attention(x, position, mask)[..., 2 : 1 + N])
            x = layer(x, position, mask)
        x = self.encoder_norm(x)  # (B, M, D)
        return x[:, 0], x[:, 2 : 1 + N], x[:, 1 + N :]  # without [CLS], which is at 1

    def box(self, reg):
        """Box = sigmoid(MLP3([REG])): (..., D) -> (..., 4) cxcywh in 0..1."""
        # in float32 throughout: in bfloat16 a coordinate would be a multiple of 1/256
        with torch.autocast(reg.device.type, enabled=False):
            return self.box_head(reg.to(self.box_head[0].weight.dtype)).sigmoid()

    def rtcc(self, patches, end):
        """RTCC: patches (B, P, D), end token of unit length (B, D) -> logits (B, P), MLP(LN(patch)) . end."""
        patches = self.rtcc_mlp(self.rtcc_norm(patches))  # (B, P, D)
        return torch.einsum("bpd,bd->bp", patches, end)

    def mask_head(self, patches, end, grid):
        """Three 2x transposed convolutions of the patches, dotted with the end token -> logits (B, 1, 8 h, 8 w).

        Nothing stands between the convolutions, so the whole is linear in the patches: the end token is pulled through
        the three kernels first, which leaves one 8 x 8 kernel a sample. Same numbers, 46 times fewer
        products in the tiny model and 152 times in ViT-B/16.
        """
        first, second, third = [conv.weight for conv in self.mask_convs]  # (D, D, 2, 2) each: in, out, y, x
        kernel = torch.einsum("cdyx,bd->bcyx", third, end)  # (B, D, 2, 2)
        for weight in (second, first):
            # each pixel (Y, X) of the earlier convolution's kernel is spread by the kernel so far, (y, x)
            kernel = torch.einsum("cdYX,bdyx->bcYyXx", weight, kernel)  # (B, D, 2, side, 2, side)
            kernel = kernel.flatten(4, 5).flatten(2, 3)  # (B, D, 2 side, 2 side): 4, then 8
        logits = torch.einsum("bpd,bdyx->bpyx", patches, kernel)  # (B, P, 8, 8)
        logits = logits.unflatten(1, grid)  # (B, h, w, 8, 8)
        # the 8 x 8 pixels of each patch in their place: rows of patches, rows inside a patch, then the columns
        logits = logits.permute(0, 1, 3, 2, 4)  # (B, h, 8, w, 8)
        return logits.flatten(3, 4).flatten(1, 2)[:, None]  # (B, 1, 8 h, 8 w)

    def score(self, output):
        """How sure the token map (RTCC) is of the box: output of this model -> (B,) in 0..1, not calibrated.

        The highest probability among the patches that count as the box's, by the rule of RTCC's own targets
        (`box_on_grid`). It is low where the map and the box disagree, and where the map finds nothing anywhere.
        """
        in_box = box_on_grid(output.boxes.float(), (self.side, self.side), self.config.clip.image_size)  # (B, P)
        return (output.token_similarity.float().sigmoid() * in_box).amax(1)

    def boxes_and_scores(self, output):
        """An output of this model -> boxes (B, 4) float32 cxcywh in 0..1 on the CPU, and a list of B scores. Raises
        ValueError where they are not numbers."""
        boxes = output.boxes.float().cpu()
        scores = self.score(output).cpu()
        if not (boxes.isfinite().all() and scores.isfinite().all()):
            raise ValueError("the model's boxes are not numbers (NaN): its weights are damaged, or their training "
                             "diverged; use another file, or a lower learning rate")
        return boxes, scores.tolist()

    def add_stage(self, stage):
        """Begin Hi LoRA stage `stage`, the next one (1, 2, ..): new adapters in place, the earlier ones frozen. Which
        layers get them: `adapted_layers` in lora.py. Raises ValueError for any other stage, whose file could not be
        read back, and for one that the configuration does not have."""
        c = self.config
        if stage != c.stage + 1:
            raise ValueError(f"after stage {c.stage} comes stage {c.stage + 1}, not {stage}")
        is_beyond = c.lora in ("hierarchical", "shared") and stage > c.lora_groups
        if is_beyond or not any(c.adapted_layers(stage)):
            advice = '; first model.config = model.config.with_lora("vanilla", rank, alpha)' if c.lora == "none" else ""
            raise ValueError(f"lora {c.lora!r} has no stage {stage}{advice}")
        settings = (c.lora_rank, c.lora_alpha, c.lora_dropout, c.lora, c.lora_order)
        lora.add_stage(self.clip.visual.blocks, stage, c.lora_groups, *settings)
        lora.add_stage(self.clip.text.blocks, stage, lora.TEXT_GROUPS, *settings)
        self.config = replace(c, stage=stage)

    def compile_blocks(self):
        """torch.compile for each transformer block, in place. Blocks that differ in weights alone share a program,
        so it takes a part of the time of the whole model, in which every block is compiled anew."""
        # the programs of a block: with a bridge, with adapters, to train and to validate, in each stage. Beyond the
        # usual limit of 8 the rest would silently stay as it is
        torch._dynamo.config.recompile_limit = 128
        for block in (*self.clip.visual.blocks, *self.clip.text.blocks, *self.encoder):
            block.compile()

    def with_bridge(self, kind):
        """A new model: everything in this one, which has no bridges, and fresh bridges of this kind."""
        model = HiVG(replace(self.config, bridge=kind))
        model.load_state_dict(model.state_dict() | self.state_dict())
        model.tokenizer = self.tokenizer
        return model.train(self.training)

    def for_prediction(self, device, dtype):
        """A new model with the same predictions, ready to be used: adapters merged, products joined (fast.py), frozen,
        in evaluation mode, on the device, its weights stored in `dtype` but for the box head, which stays float32."""
        model = self.merged().requires_grad_(False)
        simplify(model)
        model = model.to(device, dtype).eval()
        model.box_head.float()
        return model

    def merged(self):
        """A new model with the adapters folded into CLIP's weights, but for somebody's own (lora.merge), and the same
        output; this one is unchanged."""
        model = lora.merge(self)
        model.config = replace(self.config, lora="none", stage=0)
        return model
