"""Two other programs' CLIPs under our names: OpenAI's (`clip/model.py`) and Hugging Face's (`modeling_clip.py`).

`openai_clip` and `huggingface_clip` turn {their name: tensor} into (CLIPConfig, {our name: tensor}). Every size is read
off the shapes; tensors keep their dtype. Tensors that we do not need are dropped by name; any other unknown tensor
keeps its name, so that `loading.compare` reports it as left over.
"""

import re
from dataclasses import replace

from hivg.clip import CLIPConfig
from hivg.utils.messages import quoted

HEAD_WIDTH = 64  # of every CLIP that OpenAI published; no shape says it
ACTIVATION = "quick_gelu"  # nor this
HEADS = {"vision": 12, "text": 8}  # of a config.json of Hugging Face that leaves them out

# (pattern in their name, what it becomes in ours), applied in this order
OPENAI = [
    (r"^visual\.transformer\.resblocks\.", "visual.blocks."),
    (r"^transformer\.resblocks\.", "text.blocks."),
    (r"^(token_embedding|positional_embedding|ln_final|text_projection)\b", r"text.\1"),
]
OPENAI_UNUSED = r"input_resolution|context_length|vocab_size"  # sizes that the shapes say too

HUGGING_FACE = [
    (r"^vision_model\.", "visual."),
    (r"^text_model\.", "text."),
    (r"\.encoder\.layers\.", ".blocks."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^visual\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^visual\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^text\.embeddings\.token_embedding\.", "text.token_embedding."),
    (r"\.embeddings\.position_embedding\.weight$", ".positional_embedding"),
    (r"^visual\.pre_layrnorm\.", "visual.ln_pre."),  # the missing e is theirs
    (r"^visual\.post_layernorm\.", "visual.ln_post."),
    (r"^text\.final_layer_norm\.", "text.ln_final."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_projection\.weight$", "text.text_projection"),
]
HUGGING_FACE_UNUSED = r"(vision|text)_model\.embeddings\.position_ids"


class NotThisKind(ValueError):
    """The file is not what it was taken for; the message says why."""


def openai_clip(tensors):
    """The state dict of OpenAI's CLIP -> (CLIPConfig, tensors with our names). Raises NotThisKind."""
    tensors = split_in_proj(rename(tensors, OPENAI, OPENAI_UNUSED))
    return clip_config(tensors), tensors


def huggingface_clip(tensors, settings):
    """The state dict of a Hugging Face CLIPModel -> (CLIPConfig, tensors with our names). settings: its config.json, or
    {}. Raises NotThisKind."""
    tensors = rename(tensors, HUGGING_FACE, HUGGING_FACE_UNUSED)
    for name in ("visual.proj", "text.text_projection"):
        if name in tensors and tensors[name].dim() == 2:
            tensors[name] = tensors[name].T  # theirs is the weight (E, C) of a linear layer, ours (C, E)
    config = clip_config(tensors)
    for tower, width in (("vision", config.vision_width), ("text", config.text_width)):
        told = settings.get(f"{tower}_config")
        told = told if isinstance(told, dict) else {}
        if told.get("hidden_act", ACTIVATION) != ACTIVATION:
            raise NotThisKind(f"its config.json says hidden_act={quoted(told['hidden_act'], 30)}; HiVG needs a CLIP "
                              f"with {ACTIVATION}, such as OpenAI's")
        usual = HEADS[tower] if told else width // HEAD_WIDTH
        heads = told.get("num_attention_heads", usual)
        if type(heads) is not int or not 0 < heads <= width or width % heads:
            raise NotThisKind(f"its config.json says num_attention_heads={quoted(heads, 30)}, which do not divide its "
                              f"{tower} tower's width, {width}; use the config.json that was published with it")
        config = replace(config, **{f"{tower}_heads": heads})
    return config, tensors


def rename(tensors, rules, unused):
    """Apply (pattern, replacement) rules in their order to each name, without the names that `unused` matches."""
    renamed = {}
    for name, tensor in tensors.items():
        if re.fullmatch(unused, name):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def split_in_proj(tensors):
    """One matrix in_proj (3 C, C) of an attention -> q_proj, k_proj, v_proj (C, C), stacked in that order."""
    split = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.)in_proj_(weight|bias)", name)
        if match and tensor.dim() > 0 and tensor.shape[0] % 3 == 0:
            prefix, last = match.groups()
            for part, matrix in zip("qkv", tensor.chunk(3)):  # each (C, C) or (C,)
                split[f"{prefix}{part}_proj.{last}"] = matrix
        else:
            split[name] = tensor
    return split


def clip_config(tensors):
    """The CLIPConfig of tensors with our names, read off their shapes. Raises NotThisKind."""
    width, _, patch, _ = shape_of(tensors, "visual.conv1.weight", 4)
    positions, _ = shape_of(tensors, "visual.positional_embedding", 2)
    vocabulary, text_width = shape_of(tensors, "text.token_embedding.weight", 2)
    context, _ = shape_of(tensors, "text.positional_embedding", 2)
    _, embed = shape_of(tensors, "text.text_projection", 2)
    side = round((positions - 1) ** 0.5)  # of the patch grid; one position is the class token's
    if side * side != positions - 1 or width % HEAD_WIDTH or text_width % HEAD_WIDTH:
        raise NotThisKind(f"widths {width} and {text_width} (multiples of {HEAD_WIDTH} in a CLIP) and {positions} "
                          "positions (a square number and one) cannot be a CLIP's")
    return CLIPConfig(
        image_size=side * patch, patch_size=patch, embed_dim=embed, context_length=context, vocab_size=vocabulary,
        vision_width=width, vision_layers=depth_of(tensors, "visual"), vision_heads=width // HEAD_WIDTH,
        text_width=text_width, text_layers=depth_of(tensors, "text"), text_heads=text_width // HEAD_WIDTH,
    )


def shape_of(tensors, name, dimensions):
    if name not in tensors or tensors[name].dim() != dimensions:
        found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is not in it"
        raise NotThisKind(f"a CLIP has a tensor of {dimensions} dimensions for our {name}, which {found}")
    return tensors[name].shape


def depth_of(tensors, tower):
    """How many blocks a tower has: one more than the highest number in a name."""
    pattern = re.compile(rf"{tower}\.blocks\.(\d{{1,4}})\.")  # longer numbers are left over
    blocks = [int(match[1]) for match in map(pattern.match, tensors) if match]
    if not blocks:
        raise NotThisKind(f"no transformer block in its {tower} tower")
    return max(blocks) + 1
