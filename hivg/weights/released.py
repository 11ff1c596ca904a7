"""A released HiVG checkpoint under our names, with the settings under which our model computes the same.

A checkpoint is a dict with `model`, a state dict, and `args`, an `argparse.Namespace` of the program's flags.
`released_hivg` turns them into (HiVGConfig, {our name: tensor}). The adapters are folded into the weights in float32;
the bridge's adaptive weights, which are one table per text layer there, are stacked; the position table is resized
once.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import torch

from hivg.clip import resize_positions
from hivg.model import LAYERS, HiVGConfig
from hivg.utils.messages import quoted, shown
from hivg.weights.check_config import CALLED
from hivg.weights.clip_names import NotThisKind, huggingface_clip, rename, split_in_proj

# backbone -> layers of its ViT, which decide where bridges and visual levels are
BACKBONES = {"ViT-B/16": 12, "ViT-B/32": 12, "ViT-L/14": 24}

# text layers that the bridge fuses, by data set; the last one for every other
TEXT_LAYERS = {"unc+": (6, 12), "referit": (6, 12)} | dict.fromkeys(["gref", "gref_umd"], tuple(range(1, 13)))
LORA_ALPHA = 16  # W + (16 / r) B A, whatever the rank is
FLAGS = {  # the flags that decide what the model computes: type, default (None: it has none)
    "model": (str, None),  # the backbone
    "dataset": (str, None),
    "imsize": (int, None),
    "mixup_pretrain": (bool, False),  # the bridge reads the projected final text feature
    "warmup": (bool, False),  # the phase without bridges that ViT-L begins with
    "enable_adaptive_weights": (bool, False),  # and with them a projection in the bridge
    "vl_hidden_dim": (int, None),
    "vl_enc_layers": (int, 6),
    "vl_nheads": (int, 8),
    "vl_dim_feedforward": (int, 2048),
    "vl_dropout": (float, 0.1),
    "normalize_before": (bool, True),
}

# (pattern in their name, what it becomes in ours), applied in this order
IN_BLOCK = r"^vision_model\.encoder\.layers\.(\d+)\.cross_"  # a bridge lies in CLIP's block
BRIDGE = [
    (rf"{IN_BLOCK}norm\.", r"bridges.\1.ln."),
    (rf"{IN_BLOCK}attn\.", r"bridges.\1.attn."),
    (rf"{IN_BLOCK}mlp\.fc1\.", r"bridges.\1.mlp.c_fc."),
    (rf"{IN_BLOCK}mlp\.fc2\.", r"bridges.\1.mlp.c_proj."),
    (rf"{IN_BLOCK}gate\.", r"bridges.\1.proj."),
    (rf"{IN_BLOCK}adaptive_weights\.", r"bridges.\1.adaptive_weights."),
]
HEADS = [  # all that is neither CLIP nor bridge
    (r"^ml_visual_projection\.", "levels_proj."),
    (r"^condition_text_proj\.", "bridge_text_proj."),
    (r"^reg_token\.weight$", "reg_token"),
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
UNUSED = r"ml_text_feat_perceiver\.(weight|bias)|(reg|condition_text)_pos_embed\.weight"
UNUSED_UNLESS_PROJECTED = r"condition_text_proj\.(weight|bias)"
# the program always creates these of a bridge, and does not use them in mixed pre-training
BRIDGE_UNUSED_IF_MIXED = rf"{IN_BLOCK}(gate|adaptive_weights)\..*"


def released_hivg(tensors, args):
    """`model` (as {name: tensor}) and `args` of a checkpoint -> (HiVGConfig, tensors under our names). Raises
    NotThisKind."""
    flags = read_flags(args)
    clip, others = split_parts(tensors, flags)
    clip_config, clip = huggingface_clip(clip, {})
    clip_config = resize_image(flags.imsize, clip_config, clip, others)
    config = hivg_config(flags, clip_config, others)
    stack_adaptive_weights(flags, others)
    if config.bridge_blocks and not (flags.enable_adaptive_weights or flags.mixup_pretrain):
        others |= identity_bridges(config)
    return config, {f"clip.{name}": tensor for name, tensor in clip.items()} | others


# ---- its settings

def read_flags(args):
    """`args` -> those in FLAGS, of the right types, and `text_layers`. Raises NotThisKind."""
    flags = SimpleNamespace()
    for name, (kind, default) in FLAGS.items():
        value = getattr(args, name, default)
        if type(value) is not kind:  # isinstance would take True for an int
            raise NotThisKind(f"its args say {name}={quoted(value)}; a released HiVG has {CALLED[kind]} there")
        setattr(flags, name, value)
    if not flags.normalize_before:
        raise NotThisKind("its args say normalize_before=False, an encoder that normalizes after each part; the "
                          "published ones normalize before")
    if flags.model not in BACKBONES:
        raise NotThisKind(f"its args say model={quoted(flags.model)}; known are {', '.join(BACKBONES)}")
    flags.text_layers = (12,) if flags.mixup_pretrain else TEXT_LAYERS.get(flags.dataset, (12,))
    return flags


def hivg_config(flags, clip, others):
    blocks, levels = LAYERS[BACKBONES[flags.model]]
    layers = flags.text_layers
    if max(levels) > clip.vision_layers or max(layers) > clip.text_layers:
        raise NotThisKind(f"its args say model={flags.model}, dataset={flags.dataset}, which read more than its "
                          f"{clip.vision_layers} vision and {clip.text_layers} text blocks")
    hidden = others.get("rtcc_mlp.c_fc.weight")
    if hidden is None or hidden.dim() != 2:
        raise NotThisKind("no matrix visu_token_mlp.fc1.weight in it")
    return HiVGConfig(
        clip=clip, normalization="imagenet", text_padding="released", lora="none", dropout=flags.vl_dropout,
        bridge="projected" if flags.mixup_pretrain else "adaptive", bridge_blocks=() if flags.warmup else blocks,
        text_layers=layers if flags.enable_adaptive_weights else layers[-1:], text_norm=False,
        visual_levels=levels, level_norm=False, width=flags.vl_hidden_dim, encoder_layers=flags.vl_enc_layers,
        encoder_heads=flags.vl_nheads, encoder_ffn=flags.vl_dim_feedforward, rtcc_hidden=len(hidden),
    )


# ---- its tensors

def split_parts(tensors, flags):
    """A checkpoint's tensors -> two dicts: CLIP under Hugging Face's names, its adapters folded; everything else under
    our names, without what the program does not use under these flags."""
    clip = {}
    others = {}
    for name, tensor in tensors.items():
        if name.startswith("clip."):
            name = re.sub(r"^(base_model\.model\.)+", "", name.removeprefix("clip."))  # once for every wrapping by PEFT
            clip[name.replace(".base_layer.", ".")] = tensor  # which PEFT calls an adapted layer's own, from 0.6 on
        else:
            others[name] = tensor
    fold_adapters(clip)
    bridges = {name: clip.pop(name) for name in list(clip) if re.match(IN_BLOCK, name)}
    bridges = rename(bridges, BRIDGE, BRIDGE_UNUSED_IF_MIXED if flags.mixup_pretrain else "")
    unused = UNUSED if flags.mixup_pretrain and not flags.warmup else f"{UNUSED}|{UNUSED_UNLESS_PROJECTED}"
    others = split_in_proj(rename(others, HEADS, unused)) | bridges
    token = others.get("reg_token")
    if token is not None and token.dim() == 2 and len(token) == 1:
        others["reg_token"] = token[0]  # (1, D) -> (D,)
    return clip, others


def fold_adapters(tensors):
    """Replace every layer that has an adapter by W + (alpha / r) B A in float32, in place. Raises NotThisKind."""
    for name in list(tensors):
        layer = name.removesuffix(".lora_A.default.weight")
        name_B = f"{layer}.lora_B.default.weight"
        name_W = f"{layer}.weight"
        if layer == name or name_B not in tensors or name_W not in tensors:
            continue  # loading.compare reports an A that is left over
        W = tensors[name_W].double()  # (out, in)
        A = tensors.pop(name).double()  # (r, in)
        B = tensors.pop(name_B).double()  # (out, r)
        rank = len(A) if A.dim() else 0
        if rank == 0 or B.shape[1:] != (rank,) or B.shape[:1] + A.shape[1:] != W.shape:
            raise NotThisKind(f"the adapter of {shown(layer, 60)} has shapes {tuple(A.shape)} and {tuple(B.shape)}, "
                              f"its layer {tuple(W.shape)}")
        tensors[name_W] = (W + LORA_ALPHA / rank * B @ A).float()


def resize_image(image_size, config, clip, others):
    """Resize the position table in `clip` to the image size of `args`, once, where the program does it in every forward
    -> the CLIPConfig of that size. Raises NotThisKind unless the encoder's position table in `others` has that size."""
    side, rest = divmod(image_size, config.patch_size)
    if image_size < 1 or rest:
        raise NotThisKind(f"its args say imsize={quoted(image_size)}, not a multiple of the patch size "
                          f"{config.patch_size}")
    positions = 2 + side**2 + config.context_length  # [REG], [CLS], patches, text
    table = others.get("position")
    if table is None or table.shape[:1] != (positions,):
        found = "is not in it" if table is None else f"has the shape {tuple(table.shape)}"
        raise NotThisKind(f"its args say imsize={quoted(image_size)}, which makes {quoted(positions)} positions; its "
                          f"vl_pos_embed.weight {found}")
    table = clip["visual.positional_embedding"].float()  # (1 + old side ^ 2, D_v)
    clip["visual.positional_embedding"] = resize_positions(table, (side, side))  # (1 + side ^ 2, D_v)
    return replace(config, image_size=image_size)


def stack_adaptive_weights(flags, others):
    """One table per text layer of each bridge -> one tensor, in place. Raises NotThisKind."""
    blocks = {}  # block -> {i: (77, D_t)}
    for name in list(others):
        match = re.fullmatch(r"bridges\.(\d+)\.adaptive_weights\.(\d+)\.weight", name)
        if match:
            blocks.setdefault(match[1], {})[int(match[2])] = others.pop(name)
    K = len(flags.text_layers)
    for block, tables in blocks.items():
        if sorted(tables) != list(range(K)):
            raise NotThisKind(f"block {block} has adaptive weights {sorted(tables)}; dataset={flags.dataset} reads {K} "
                              "text layers")
        if len({table.shape for table in tables.values()}) > 1:
            raise NotThisKind(f"block {block} has adaptive weights of different shapes")
        others[f"bridges.{block}.adaptive_weights"] = torch.stack([tables[i] for i in range(K)])  # (K, 77, D_t)


def identity_bridges(config):
    """With the adaptive weights switched off, keys and values are the last text layer's features themselves: adaptive
    weights of zero, and an identity projection. Raises NotThisKind."""
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
