"""Other people's weights in our names: OpenAI CLIP, Hugging Face CLIP, released HiVG checkpoints.

Each function takes {their name: tensor} and gives (config, {our name: tensor}) with every size read off the shapes. The
tensors stay in the type they were saved in, but for what has to be computed (folded adapters, resized positions), which
is float32. What a kind always holds and we do not need is left out by name; anything else that is not ours is kept
under its own name, for `weights.check_keys` to report as left over. Sources: OpenAI's `clip/model.py`, Hugging Face's
`modeling_clip.py`; the released program's computation is described in each place below.
"""

import re

import torch

from hivg.clip import CLIPConfig, resize_positions
from hivg.model import LAYERS, HiVGConfig

# theirs -> ours, applied in order to each name
OPENAI = [(r"^visual\.transformer\.resblocks\.", "visual.blocks."), (r"^transformer\.resblocks\.", "text.blocks."),
          (r"^(token_embedding|positional_embedding|ln_final|text_projection)\b", r"text.\1")]
OPENAI_UNUSED = {"input_resolution", "context_length", "vocab_size"}  # beside the weights; the shapes say it too

HUGGING_FACE = [
    (r"^vision_model\.", "visual."), (r"^text_model\.", "text."), (r"\.encoder\.layers\.", ".blocks."),
    (r"\.self_attn\.", ".attn."), (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^visual\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^visual\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^text\.embeddings\.token_embedding\.", "text.token_embedding."),
    (r"\.embeddings\.position_embedding\.weight$", ".positional_embedding"),
    (r"^visual\.pre_layrnorm\.", "visual.ln_pre."), (r"^visual\.post_layernorm\.", "visual.ln_post."),
    (r"^text\.final_layer_norm\.", "text.ln_final."),
    (r"^visual_projection\.weight$", "visual.proj"), (r"^text_projection\.weight$", "text.text_projection"),
]
HUGGING_FACE_UNUSED = {"vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"}

BRIDGE = [  # the rest of a block's name in a released checkpoint -> in our Bridge
    (r"^cross_norm\.", "ln."), (r"^cross_attn\.", "attn."), (r"^cross_mlp\.fc1\.", "mlp.c_fc."),
    (r"^cross_mlp\.fc2\.", "mlp.c_proj."), (r"^cross_gate\.", "proj."),
]
RELEASED = [
    (r"^ml_visual_projection\.", "levels_proj."), (r"^condition_text_proj\.", "bridge_text_proj."),
    (r"^vl_pos_embed\.weight$", "position"), (r"^vl_transformer\.encoder\.layers\.", "encoder."),
    (r"^vl_transformer\.encoder\.norm\.", "encoder_norm."), (r"\.self_attn\.", ".attn."),
    (r"^bbox_embed\.layers\.0\.", "box_head.0."), (r"^bbox_embed\.layers\.1\.", "box_head.2."),
    (r"^bbox_embed\.layers\.2\.", "box_head.4."), (r"^visu_proj\.", "visual_proj."),
    (r"^visu_token_norm\.", "rtcc_norm."), (r"^visu_token_mlp\.fc1\.", "rtcc_mlp.c_fc."),
    (r"^visu_token_mlp\.fc2\.", "rtcc_mlp.c_proj."), (r"^seg_conv1\.", "mask_convs.0."),
    (r"^seg_conv2\.", "mask_convs.1."), (r"^seg_conv3\.", "mask_convs.2."),
]
RELEASED_UNUSED = {"ml_text_feat_perceiver.weight", "ml_text_feat_perceiver.bias", "reg_pos_embed.weight",
                   "condition_text_pos_embed.weight"}
TEXT_LAYERS = {"gref": tuple(range(1, 13)), "gref_umd": tuple(range(1, 13)), "unc+": (6, 12), "referit": (6, 12)}


class NotThisKind(ValueError):
    """The tensors are not what they were taken for; the message says why."""


def kind_of(tensors):
    """Which of ours the names look like: "openai", "huggingface", "released", or None."""
    if any(name.startswith("visual.layer1.") for name in tensors):
        raise NotThisKind("a CLIP with a ResNet (RN50, RN101, RN50x4, ..); HiVG needs a ViT: ViT-B/32, ViT-B/16, "
                          "ViT-L/14 or ViT-L/14@336px")
    marks = {"released": r"clip\..*vision_model\.", "openai": r"visual\.(conv1|transformer)\.",
             "huggingface": r"vision_model\.(embeddings|encoder)\."}
    return next((kind for kind, mark in marks.items() if any(re.match(mark, name) for name in tensors)), None)


def rename(tensors, rules):
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        renamed[name] = tensor
    return renamed


def split_in_proj(tensors):
    """The one matrix of attention (3 C, C) -> q_proj, k_proj, v_proj, which stand in it from top to bottom."""
    for name in [name for name in tensors if re.search(r"\.in_proj_(weight|bias)$", name)]:
        prefix, last = name.split("in_proj_")
        if tensors[name].shape[0] % 3 == 0:
            for part, tensor in zip("qkv", tensors.pop(name).chunk(3)):
                tensors[f"{prefix}{part}_proj.{last}"] = tensor
    return tensors


def clip_config(tensors):
    """The CLIPConfig of tensors with our names, from their shapes; heads are 64 wide, as in every CLIP of OpenAI's."""
    def shape(name, n):
        if name not in tensors or tensors[name].dim() != n:
            found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is not in it"
            raise NotThisKind(f"a CLIP has a tensor of {n} dimensions for our {name}, which {found}")
        return tensors[name].shape

    def depth(tower):
        numbers = [int(m[1]) for name in tensors if (m := re.match(rf"{tower}\.blocks\.(\d+)\.", name))]
        if not numbers:
            raise NotThisKind(f"no transformer block in its {'picture' if tower == 'visual' else 'text'} tower")
        return max(numbers) + 1

    width, _, patch, _ = shape("visual.conv1.weight", 4)
    positions, _ = shape("visual.positional_embedding", 2)
    vocabulary, text_width = shape("text.token_embedding.weight", 2)
    context, _ = shape("text.positional_embedding", 2)
    _, embed = shape("text.text_projection", 2)
    side = round((positions - 1) ** 0.5)
    if side * side != positions - 1 or width % 64 or text_width % 64:
        raise NotThisKind(f"widths {width} and {text_width} (multiples of 64 in a CLIP) and {positions} positions (a "
                          "square number and one) cannot be a CLIP's")
    return CLIPConfig(side * patch, patch, width, depth("visual"), width // 64, text_width, depth("text"),
                      text_width // 64, embed, context, vocabulary)


def without(tensors, unused):
    return {name: tensor for name, tensor in tensors.items() if name not in unused}


def openai_clip(tensors):
    """The state dict of OpenAI's CLIP -> (CLIPConfig, tensors with our names)."""
    tensors = split_in_proj(rename(without(tensors, OPENAI_UNUSED), OPENAI))
    return clip_config(tensors), tensors


def huggingface_clip(tensors):
    """The state dict of a Hugging Face CLIPModel -> (CLIPConfig, tensors with our names)."""
    tensors = rename(without(tensors, HUGGING_FACE_UNUSED), HUGGING_FACE)
    for name in ("visual.proj", "text.text_projection"):  # they hold (E, C), and multiply by its transpose
        if name in tensors:
            tensors[name] = tensors[name].T
    return clip_config(tensors), tensors


def fold_adapters(tensors, alpha=16):
    """W + (alpha / r) B A for every layer with an adapter, in float32."""
    for name in [name for name in tensors if name.endswith(".lora_A.default.weight")]:
        layer = name.removesuffix(".lora_A.default.weight")
        pair = (f"{layer}.lora_B.default.weight", f"{layer}.weight")
        if all(key in tensors for key in pair):
            A, B = tensors.pop(name).double(), tensors.pop(pair[0]).double()
            if B.shape[1] == A.shape[0] and (len(B), A.shape[1]) == tensors[pair[1]].shape:
                tensors[pair[1]] = (tensors[pair[1]].double() + alpha / len(A) * B @ A).float()
            else:
                raise NotThisKind(f"the adapter of {layer} has shapes {tuple(A.shape)} and {tuple(B.shape)}, its layer "
                                  f"{tuple(tensors[pair[1]].shape)}")
    return tensors


def setting(args, name, kinds, default=None):
    """One entry of the released program's `args`, which must be of a kind; without a default it must be there."""
    value = getattr(args, name, default)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise NotThisKind(f"its args say {name}={value!r:.60}, which is no setting of HiVG's")
    return value


def released_hivg(tensors, args):
    """The `model` and `args` of a released checkpoint -> (HiVGConfig, tensors with our names)."""
    backbone, dataset = setting(args, "model", str), setting(args, "dataset", str)
    mixed, warmup = (setting(args, name, bool, False) for name in ("mixup_pretrain", "warmup"))
    adaptive = setting(args, "enable_adaptive_weights", bool, False)
    if backbone not in ("ViT-B/16", "ViT-B/32", "ViT-L/14"):
        raise NotThisKind(f"its args say model={backbone!r:.60}; known are ViT-B/16, ViT-B/32 and ViT-L/14")
    clip = {name.removeprefix("clip."): t for name, t in tensors.items() if name.startswith("clip.")}
    rest = {name: t for name, t in tensors.items() if not name.startswith("clip.")}
    clip = fold_adapters({re.sub(r"^(base_model\.model\.)+", "", name): t for name, t in clip.items()})

    bridge_part = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(cross_.*)")
    bridges = {name: clip.pop(name) for name in list(clip) if bridge_part.match(name)}
    config, clip = huggingface_clip(clip)
    side = setting(args, "imsize", int)
    if side < 1 or side % config.patch_size:
        raise NotThisKind(f"its args say imsize={side}, which is no multiple of the patch size {config.patch_size}")
    config = CLIPConfig(**(vars(config) | {"image_size": side}))
    grid = side // config.patch_size
    table = clip["visual.positional_embedding"].float()
    clip["visual.positional_embedding"] = resize_positions(table, (grid, grid))  # once, not in every forward

    blocks, levels = LAYERS[24 if backbone == "ViT-L/14" else 12]
    layers = (12,) if mixed else TEXT_LAYERS.get(dataset, (12,))
    settings = HiVGConfig(
        clip=config, bridge="projected" if mixed else "adaptive", bridge_blocks=() if warmup else blocks,
        visual_levels=levels, text_layers=layers if adaptive or mixed else layers[-1:],
        text_norm=False, level_norm=False, text_padding="released", normalization="imagenet", lora="none",
        width=setting(args, "vl_hidden_dim", int), encoder_layers=setting(args, "vl_enc_layers", int, 6),
        encoder_heads=setting(args, "vl_nheads", int, 8), encoder_ffn=setting(args, "vl_dim_feedforward", int, 2048),
        dropout=setting(args, "vl_dropout", float, 0.1), rtcc_hidden=_rows(rest, "visu_token_mlp.fc1.weight"))
    if max(levels) > config.vision_layers or max(layers) > config.text_layers:
        raise NotThisKind(f"its args say model={backbone}, dataset={dataset}, which read more than its "
                          f"{config.vision_layers} vision and {config.text_layers} text blocks")

    ours = {f"clip.{name}": tensor for name, tensor in clip.items()}
    adaptive_weights = {}  # block -> {i: (77, D_t)}
    for name, tensor in bridges.items():
        block, part = bridge_part.match(name).groups()
        number = re.fullmatch(r"cross_adaptive_weights\.(\d+)\.weight", part)
        if settings.bridge == "projected" and re.match(r"cross_(gate|adaptive_weights)\.", part):
            continue  # made by the program whatever it is set to, and not used then
        if number:
            adaptive_weights.setdefault(block, {})[int(number[1])] = tensor
        else:
            ours |= rename({part: tensor}, [(pattern, f"bridges.{block}.{to}") for pattern, to in BRIDGE])
    for block, parts in adaptive_weights.items():
        stack = [parts[i] for i in sorted(parts)]
        if sorted(parts) != list(range(len(layers))) or len({t.shape for t in stack}) > 1:
            raise NotThisKind(f"block {block} has adaptive weights {sorted(parts)}; dataset={dataset} reads "
                              f"{len(layers)} text layers")
        ours[f"bridges.{block}.adaptive_weights"] = torch.stack(stack)
    if not (adaptive or mixed):  # the keys are the last text layer's features as they are
        if config.text_width != config.vision_width:
            raise NotThisKind("its args switch the adaptive weights off without mixup_pretrain, which needs text and "
                              f"vision towers of one width, not {config.text_width} and {config.vision_width}")
        for block in settings.bridge_blocks:
            ours[f"bridges.{block}.adaptive_weights"] = torch.zeros(1, config.context_length, config.text_width)
            ours[f"bridges.{block}.proj.weight"] = torch.eye(config.vision_width)
            ours[f"bridges.{block}.proj.bias"] = torch.zeros(config.vision_width)

    if not mixed:
        rest = without(rest, {"condition_text_proj.weight", "condition_text_proj.bias"})
    reg = rest.pop("reg_token.weight", None)
    if reg is not None:
        ours["reg_token"] = reg[0] if reg.dim() == 2 and len(reg) == 1 else reg
    return settings, ours | split_in_proj(rename(without(rest, RELEASED_UNUSED), RELEASED))


def _rows(tensors, name):
    if name not in tensors or tensors[name].dim() != 2:
        raise NotThisKind(f"no matrix {name} in it")
    return len(tensors[name])
