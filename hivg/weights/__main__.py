"""Weights files on the command line.

    python -m hivg.weights fetch ViT-B/16   OpenAI's weights and merge table into weights/
    python -m hivg.weights convert IN OUT   any file that can be loaded, written as our own .safetensors
    python -m hivg.weights show FILE        what is in a file: kind, sizes, parameters, settings
"""

import os
import sys
from dataclasses import asdict

from hivg.model import HiVG
from hivg.utils.cli import Parser, run
from hivg.utils.messages import shown
from hivg.weights import FOLDER, KINDS, build, download, load, read, save


def describe(path):
    """What is in a file, as lines of text. The model is built, so the file is known to load. Raises WeightsError."""
    file = read(path)
    count = len(file.tensors)  # `build` empties it
    model = build(path, file)
    config = model.config if isinstance(model, HiVG) else None
    clip = config.clip if config else model.config
    rows = {
        "kind": KINDS[file.kind],
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "tensors": count,
        "tokenizer": f"{model.tokenizer.vocab_size} tokens" if model.tokenizer else "none found; see `fetch`",
        "image": f"{clip.image_size} px, patches of {clip.patch_size} px",
        "vision tower": f"{clip.vision_layers} blocks, {clip.vision_width} wide, {clip.vision_heads} heads",
        "text tower": f"{clip.text_layers} blocks, {clip.text_width} wide, {clip.text_heads} heads, "
                      f"{clip.context_length} positions, {clip.vocab_size} tokens",
        "embedding": clip.embed_dim,
    }
    if config:
        rows["Hi LoRA"] = "no adapters" if config.lora == "none" else f"{config.lora}, stage {config.stage}"
        for name, value in asdict(config).items():
            if name not in ("clip", "lora", "stage"):
                rows[name] = value
    rows |= {shown(name): shown(value, 2000) for name, value in file.info.items()}
    return "\n".join(f"{name:<20} {value}" for name, value in rows.items())


def convert(source, target):
    """Write any file that can be loaded as our own. Raises ValueError or OSError."""
    if not target.endswith(".safetensors"):
        raise ValueError(f"{shown(target)}: our files are .safetensors; give OUT that suffix")
    if os.path.lexists(target):
        raise ValueError(f"{shown(target)}: exists; give OUT another name, or remove the file first")
    model = load(source)
    save(target, model, model.info)
    print(shown(target, 1000))
    if model.tokenizer is None:
        print(f"no {download.TABLE} was found beside {shown(source)} or in weights/, so the new file has no tokenizer",
              file=sys.stderr)


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="fetch | convert | show")
    command = commands.add_parser("fetch", help="download OpenAI's weights and merge table into weights/")
    command.add_argument("model", metavar="MODEL", help=", ".join(download.FILES))
    command = commands.add_parser("convert", help="write any file that can be loaded as our own")
    command.add_argument("source", metavar="IN", help="a weights file of any kind")
    command.add_argument("target", metavar="OUT", help="the file to make, .safetensors")
    command = commands.add_parser("show", help="show what is in a file")
    command.add_argument("file", metavar="FILE", help="a weights file of any kind")
    args = parser.parse_args()
    if args.command == "fetch":
        for path in download.fetch(args.model, FOLDER):
            print(path)
    elif args.command == "convert":
        convert(args.source, args.target)
    else:
        print(describe(args.file))


if __name__ == "__main__":
    run(main, "interrupted; the same command starts again, fetch where it stopped")
