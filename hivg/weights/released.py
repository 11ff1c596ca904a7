"""A released HiVG checkpoint in our names, with the settings that make our model compute what the published one does.

A checkpoint is a dict with `model`, a state dict, and `args`, an `argparse.Namespace` of the program's flags.
`released_hivg` turns them into (HiVGConfig, {our name: tensor}). The adapters are folded into the weights, in float32;
the bridge's adaptive weights, one table for a text layer there, are stacked; the position table is resized once.
"""

import re
from dataclasses import dataclass, replace

import torch

from hivg.clip import resize_positions
from hivg.model import LAYERS, HiVGConfig
from hivg.utils.messages import quoted, shown
from hivg.weights.clip_names import NotThisKind, huggingface_clip, rename, split_in_proj, without

# backbone -> layers of its ViT, which decide where bridges and visual levels are
BACKBONES = {"ViT-B/16": 12, "ViT-B/32": 12, "ViT-L/14": 24}

# text layers that the bridge fuses, by data set; the last one for every other
TEXT_LAYERS = {
    "gref": tuple(range(1, 13)),
    "gref_umd": tuple(range(1, 13)),
    "unc+": (6, 12),
    "referit": (6, 12),
}
LORA_ALPHA = 16  # W + (16 / r) B A, whatever the rank is

# (pattern in their name, what it becomes in ours), applied in this order
BRIDGE = [  # what follows a vision block's name -> in our Bridge
    (r"^cross_norm\.", "ln."),
    (r"^cross_attn\.", "attn."),
    (r"^cross_mlp\.fc1\.", "mlp.c_fc."),
    (r"^cross_mlp\.fc2\.", "mlp.c_proj."),
    (r"^cross_gate\.", "proj."),
]
HEADS = [  # all that is neither CLIP nor bridge
    (r"^ml_visual_projection\.", "levels_proj."),
    (r"^condition_text_proj\.", "bridge_text_proj."),
    (r"^vl_pos_embed\.weight$", "position"),
    (r"^vl_transformer\.encoder\.layers\.", "encoder."),
    (r"^vl_transformer\.encoder\.norm\.", "encoder_norm."),
    (r"\.self_attn\.", ".attn."),
    (r"^bbox_embed\.layers\.0\.", "box_head.0."),
    (r"^bbox_embed\.layers\.1\.", "box_head.2."),
    (r"^bbox_embed\.layers\.2\.", "box_head.4."),
    (r"^visu_proj\.", "visual_proj."),
    (r"^visu_token_norm\.", "rtcc_norm."),
    (r"^visu_token_mlp\.fc1\.", "rtcc_mlp.c_fc."),
    (r"^visu_token_mlp\.fc2\.", "rtcc_mlp.c_proj."),
    (r"^seg_conv1\.", "mask_convs.0."),
    (r"^seg_conv2\.", "mask_convs.1."),
    (r"^seg_conv3\.", "mask_convs.2."),
]
UNUSED = {
    "ml_text_feat_perceiver.weight",
    "ml_text_feat_perceiver.bias",
    "reg_pos_embed.weight",
    "condition_text_pos_embed.weight",
}
UNUSED_UNLESS_MIXED = {"condition_text_proj.weight", "condition_text_proj.bias"}
BRIDGE_NAME = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(cross_.*)")  # block, rest of the name
CALLED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Settings:
    """The program's flags that decide what the model computes."""

    backbone: str
    dataset: str
    image_size: int
    mixed: bool  # mixed pre-training: the bridge reads the projected final text feature
    warmup: bool  # the phase without bridges that ViT-L begins with
    adaptive: bool  # adaptive weights and a projection in the bridge
    width: int
    layers: int
    heads: int
    ffn: int
    dropout: float

    @property
    def text_layers(self):
        return (12,) if self.mixed else TEXT_LAYERS.get(self.dataset, (12,))


def looks_released(tensors):
    return any(re.match(r"clip\..*vision_model\.", name) for name in tensors)


def released_hivg(tensors, args):
    """`model` (as {name: tensor}) and `args` of a checkpoint -> (HiVGConfig, tensors with our names). Raises
    NotThisKind."""
    settings = read_settings(args)
    clip, bridges, heads = split_parts(tensors)
    clip_config, clip = huggingface_clip(clip)
    check_image_size(settings.image_size, clip_config, heads)
    clip_config = resize_to(settings.image_size, clip_config, clip)
    config = hivg_config(settings, clip_config, heads)
    ours = {f"clip.{name}": tensor for name, tensor in clip.items()}
    ours |= bridge_tensors(settings, bridges)
    if not (settings.adaptive or settings.mixed):
        ours |= identity_bridges(config)
    ours |= head_tensors(settings, heads)
    return config, ours


# ---- its settings

def read_settings(args):
    """`args` -> Settings. Raises NotThisKind."""
    settings = Settings(
        backbone=setting(args, "model", str),
        dataset=setting(args, "dataset", str),
        image_size=setting(args, "imsize", int),
        mixed=setting(args, "mixup_pretrain", bool, False),
        warmup=setting(args, "warmup", bool, False),
        adaptive=setting(args, "enable_adaptive_weights", bool, False),
        width=setting(args, "vl_hidden_dim", int),
        layers=setting(args, "vl_enc_layers", int, 6),
        heads=setting(args, "vl_nheads", int, 8),
        ffn=setting(args, "vl_dim_feedforward", int, 2048),
        dropout=setting(args, "vl_dropout", float, 0.1),
    )
    if not setting(args, "normalize_before", bool, True):
        raise NotThisKind("its args say normalize_before=False, an encoder that normalises after each part; those "
                          "published normalise before")
    if settings.backbone not in BACKBONES:
        raise NotThisKind(f"its args say model={quoted(settings.backbone)}; known are {', '.join(BACKBONES)}")
    return settings


def setting(args, name, kind, default=None):
    """One entry of `args`, which must be of this type; without a default it must be there."""
    value = getattr(args, name, default)
    is_bool_for_int = isinstance(value, bool) and kind is not bool  # Python takes True for an int
    if not isinstance(value, kind) or is_bool_for_int:
        raise NotThisKind(f"its args say {name}={quoted(value)}; a released HiVG has {CALLED[kind]} there")
    return value


def hivg_config(settings, clip, heads):
    blocks, levels = LAYERS[BACKBONES[settings.backbone]]
    layers = settings.text_layers
    if max(levels) > clip.vision_layers or max(layers) > clip.text_layers:
        raise NotThisKind(f"its args say model={settings.backbone}, dataset={settings.dataset}, which read more than "
                          f"its {clip.vision_layers} vision and {clip.text_layers} text blocks")
    hidden = heads.get("visu_token_mlp.fc1.weight")
    if hidden is None or hidden.dim() != 2:
        raise NotThisKind("no matrix visu_token_mlp.fc1.weight in it")
    return HiVGConfig(
        clip=clip,
        bridge="projected" if settings.mixed else "adaptive",
        bridge_blocks=() if settings.warmup else blocks,
        text_layers=layers if settings.adaptive or settings.mixed else layers[-1:],
        text_norm=False,
        visual_levels=levels,
        level_norm=False,
        width=settings.width,
        encoder_layers=settings.layers,
        encoder_heads=settings.heads,
        encoder_ffn=settings.ffn,
        rtcc_hidden=len(hidden),
        dropout=settings.dropout,
        lora="none",
        normalization="imagenet",
        text_padding="released",
    )


# ---- its tensors

def split_parts(tensors):
    """A checkpoint's tensors -> three dicts: CLIP under Hugging Face's names, its adapters folded; the bridges, whose
    names lie among the CLIP's; everything else."""
    clip = {}
    heads = {}
    for name, tensor in tensors.items():
        if name.startswith("clip."):
            name = re.sub(r"^(base_model\.model\.)+", "", name.removeprefix("clip."))  # once for every wrapping by PEFT
            clip[name.replace(".base_layer.", ".")] = tensor  # which PEFT calls an adapted layer's own, from 0.6 on
        else:
            heads[name] = tensor
    fold_adapters(clip)
    bridges = {name: clip.pop(name) for name in list(clip) if BRIDGE_NAME.match(name)}
    return clip, bridges, heads


def fold_adapters(tensors, alpha=LORA_ALPHA):
    """Replace every layer that has an adapter by W + (alpha / r) B A in float32, in place. Raises NotThisKind."""
    for name in list(tensors):
        if not name.endswith(".lora_A.default.weight"):
            continue
        layer = name.removesuffix(".lora_A.default.weight")
        name_B = f"{layer}.lora_B.default.weight"
        name_W = f"{layer}.weight"
        if name_B not in tensors or name_W not in tensors:
            continue  # loading.compare reports the A that is left over
        W = tensors[name_W].double()  # (out, in)
        A = tensors.pop(name).double()  # (r, in)
        B = tensors.pop(name_B).double()  # (out, r)
        rank = len(A) if A.dim() else 0
        if rank == 0 or B.shape[1:] != (rank,) or B.shape[:1] + A.shape[1:] != W.shape:
            raise NotThisKind(f"the adapter of {shown(layer, 60)} has shapes {tuple(A.shape)} and {tuple(B.shape)}, "
                              f"its layer {tuple(W.shape)}")
        tensors[name_W] = (W + alpha / rank * B @ A).float()


def check_image_size(image_size, config, heads):
    """Raises NotThisKind unless the image size of `args` is that of the encoder's position table."""
    if image_size < 1 or image_size % config.patch_size:
        raise NotThisKind(f"its args say imsize={quoted(image_size)}, which is no multiple of the patch size "
                          f"{config.patch_size}")
    positions = 2 + (image_size // config.patch_size) ** 2 + config.context_length  # [REG], [CLS], patches, text
    table = heads.get("vl_pos_embed.weight")
    if table is None or table.shape[:1] != (positions,):
        found = "is not in it" if table is None else f"has the shape {tuple(table.shape)}"
        raise NotThisKind(f"its args say imsize={quoted(image_size)}, which makes {quoted(positions)} positions; its "
                          f"vl_pos_embed.weight {found}")


def resize_to(image_size, config, clip):
    """Resize the position table in `clip` to the image size of `args`, once where the program does it in every forward
    -> the CLIPConfig of that size."""
    side = image_size // config.patch_size
    table = clip["visual.positional_embedding"].float()  # (1 + old side ^ 2, D_v)
    clip["visual.positional_embedding"] = resize_positions(table, (side, side))  # (1 + side ^ 2, D_v)
    return replace(config, image_size=image_size)


def bridge_tensors(settings, bridges):
    """The bridges' tensors under our names. Raises NotThisKind."""
    ours = {}
    adaptive_weights = {}  # block -> {i: (77, D_t)}
    for name, tensor in bridges.items():
        block, part = BRIDGE_NAME.match(name).groups()
        if settings.mixed and re.match(r"cross_(gate|adaptive_weights)\.", part):
            continue  # the program makes these in any case, and does not use them in mixed pre-training
        number = re.fullmatch(r"cross_adaptive_weights\.(\d+)\.weight", part)
        if number:
            adaptive_weights.setdefault(block, {})[int(number[1])] = tensor
            continue
        for pattern, replacement in BRIDGE:
            part = re.sub(pattern, replacement, part)
        ours[f"bridges.{block}.{part}"] = tensor
    for block, tables in adaptive_weights.items():
        ours[f"bridges.{block}.adaptive_weights"] = stack_tables(settings, block, tables)
    return ours


def stack_tables(settings, block, tables):
    """{i: (77, D_t)}, a table for every text layer -> (K, 77, D_t)."""
    K = len(settings.text_layers)
    if sorted(tables) != list(range(K)):
        raise NotThisKind(f"block {block} has adaptive weights {sorted(tables)}; dataset={settings.dataset} reads "
                          f"{K} text layers")
    stack = [tables[i] for i in range(K)]
    if len({table.shape for table in stack}) > 1:
        raise NotThisKind(f"block {block} has adaptive weights of several shapes; they must all have one")
    return torch.stack(stack)


def identity_bridges(config):
    """With the adaptive weights switched off, keys and values are the last text layer's features as they are: adaptive
    weights of zero and the identity for the projection. Raises NotThisKind."""
    clip = config.clip
    if clip.text_width != clip.vision_width:
        raise NotThisKind("its args switch the adaptive weights off without mixup_pretrain, which needs text and "
                          f"vision towers of one width, not {clip.text_width} and {clip.vision_width}")
    ours = {}
    for block in config.bridge_blocks:
        ours[f"bridges.{block}.adaptive_weights"] = torch.zeros(1, clip.context_length, clip.text_width)
        ours[f"bridges.{block}.proj.weight"] = torch.eye(clip.vision_width)
        ours[f"bridges.{block}.proj.bias"] = torch.zeros(clip.vision_width)
    return ours


def head_tensors(settings, heads):
    """Encoder, heads and projections under our names."""
    unused = UNUSED if settings.mixed else UNUSED | UNUSED_UNLESS_MIXED
    heads = without(heads, unused)
    token = heads.pop("reg_token.weight", None)  # (1, D)
    ours = split_in_proj(rename(heads, HEADS))
    if token is not None:
        ours["reg_token"] = token[0] if token.dim() == 2 and len(token) == 1 else token  # (D,)
    return ours
