"""Ground expressions in images: print the boxes and draw them.

    python ground.py                                     a bundled image, with the bundled weights
    python ground.py photo.jpg -e "the man on the left"  your own; -e may be given several times
    python ground.py folder/ -e "the red star" --json    every image of a folder, a JSON object a line

Where hivg is installed (`pip install .`), the same command is called hivg-ground.
"""

import json
import os
import sys
from itertools import chain
from pathlib import Path

from PIL import Image

from hivg.data.images import ImageError
from hivg.grounder import DEFAULT_WEIGHTS, HEATMAPS, Grounder, draw_results
from hivg.utils.cli import Parser, Progress, add_machine_flags, run
from hivg.utils.files import save_image
from hivg.utils.messages import shown
from hivg.weights import bundled

EXAMPLE = bundled("example.png")
EXAMPLE_EXPRESSION = "the star left of the blue square"
UNREADABLE = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow recognises these, but cannot read them


def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="images or folders of images")
    parser.add_argument("-e", "--expression", action="append", metavar="TEXT", help="what to find; may be repeated")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, metavar="FILE", help="a HiVG weights file")
    parser.add_argument("--output", metavar="PATH", help="the drawn image (default: grounded.png); for several images, "
                        "or ending in /, a folder (default: grounded/)")
    parser.add_argument("--heatmap", choices=HEATMAPS, help="also draw a heat map of the first expression: tokens, "
                        "the default, is the token map; attention, where the token of the box looks")
    parser.add_argument("--mask", action="store_true", help="also draw the mask of the first expression")
    parser.add_argument("--save_masks", metavar="FOLDER", help="write each expression's mask as a black and white PNG: "
                        "NAME-1.png, NAME-2.png for the expressions of NAME.jpg")
    parser.add_argument("--min_score", type=float, default=0.0, metavar="S", help="0 to 1; below this score nothing "
                        "counts as found: no box and no mask")
    parser.add_argument("--json", action="store_true", help="print a JSON object per line; draw only with --output")
    parser.add_argument("--rle", action="store_true", help="with --json: add masks, as COCO's compressed run lengths")
    add_machine_flags(parser)
    args = parser.parse_args(with_heatmap_named(sys.argv[1:]))
    if args.expression and not args.images:
        parser.error("an expression, but no image; name an image before -e")
    if args.images and not args.expression:
        parser.error('an image, but no expression; add -e "the object to find"')
    if not 0 <= args.min_score <= 1:
        parser.error(f"--min_score must be from 0 to 1, not {args.min_score}")
    if "" in (args.output, args.save_masks):
        parser.error("--output and --save_masks must name a file or folder, not be empty")
    if args.rle and not args.json:
        parser.error("--rle is for --json; give both, or --save_masks FOLDER for PNG files")
    if not args.images:
        args.images = [short_path(EXAMPLE)]
        args.expression = [EXAMPLE_EXPRESSION]
    return args


def short_path(path):
    """Relative to the current folder, where there is such a path: not between two drives of Windows."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def with_heatmap_named(words):
    """The command line, with the token map named where --heatmap is followed by something else, such as an image."""
    bare = [word == "--heatmap" and after not in HEATMAPS for word, after in zip(words, [*words[1:], ""])]
    return ["--heatmap=tokens" if is_bare else word for word, is_bare in zip(words, bare)]


def list_images(names):
    """Files, and the images of folders, sorted by name. Raises ImageError for a folder without any."""
    kinds = Image.registered_extensions()  # {suffix: kind}
    suffixes = {suffix for suffix, kind in kinds.items() if kind in Image.OPEN and kind not in UNREADABLE}
    paths = []
    for name in names:
        if not os.path.isdir(name):  # unlike Path.is_dir, False for a name that no file can have
            paths.append(str(name))
            continue
        try:
            inside = sorted(path for path in Path(name).iterdir() if path.suffix.lower() in suffixes)
        except OSError as error:
            raise ImageError(f"{shown(name)}: cannot be listed ({error.strerror}); check the folder") from None
        if not inside:
            raise ImageError(f"{shown(name)}: no image in this folder; name a folder with PNG or JPEG files")
        paths += [str(path) for path in inside]
    return paths


def drawing_paths(args, images, several):
    """The file for the drawing of each image; None with --json and no --output."""
    if args.json and not args.output:
        return [None] * len(images)
    output = args.output or ("grounded/" if several else "grounded.png")
    if not several and not os.path.isdir(output) and not output.endswith(("/", os.sep)):
        return [Path(output)]
    return [Path(output, f"{name}.png") for name in names_of(images)]


def mask_paths(args, images):
    """For each image, the file for the mask of each expression; none without --save_masks."""
    if not args.save_masks:
        return [[]] * len(images)
    numbers = range(1, len(args.expression) + 1)
    return [[Path(args.save_masks, f"{name}-{number}.png") for number in numbers] for name in names_of(images)]


def names_of(images):
    """The names of image files without folder and suffix, made unique."""
    names = {}  # {name: image}
    numbers = {}  # {name without its number: the last number}
    for image in images:
        stem = name = Path(image).stem
        while name in names:  # two images of one name, such as a.jpg and a.png
            numbers[stem] = numbers.get(stem, 1) + 1
            name = f"{stem}-{numbers[stem]}"
        names[name] = image
    return list(names)


def refuse_to_overwrite(images, targets):
    """Raises ValueError if a file to be written is one of the images, or two of them are the same file."""
    targets = [target for target in targets if target]
    if len({os.path.abspath(target) for target in targets}) < len(targets):
        raise ValueError("a drawing would replace a mask; give --output and --save_masks different folders")
    image_at = {place_of(image): image for image in images}
    for target in targets:
        place = place_of(target)
        if place and place in image_at:
            raise ValueError(f"{image_at[place]}: {target} would replace the image; give another --output or "
                             "--save_masks")


def place_of(path):
    """(device, inode) of a file, the same by whatever path; None if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # the latter: a name that no file can have
        return None
    return found.st_dev, found.st_ino


def report(args, image, results):
    """Print the results of one image."""
    width, height = results[0].image.size
    if args.json:
        entries = []
        for result in results:
            entry = result.to_dict()
            if args.rle:
                entry["mask"] = result.mask_rle()
            if result.score < args.min_score:
                entry |= {name: None for name in ("box", "mask") if name in entry}  # nothing is found
            entries.append(entry)
        print(json.dumps({"image": image, "width": width, "height": height, "results": entries}), flush=True)
        return
    print(f"{shown(image, 1000)} ({width} x {height})")
    for result in results:
        box = ", ".join(f"{v:.1f}" for v in result.box)
        found = f"box ({box})" if result.score >= args.min_score else "nothing found"
        print(f"  {shown(result.expression, 1000)}: {found}, score {result.score:.2f}", flush=True)


def write_files(args, results, drawing, masks):
    """Write the drawing of one image, unless it is None, and its masks."""
    for result, path in zip(results, masks):
        result.save_mask(path, args.min_score)
    if drawing:
        image = draw_results(results, args.heatmap, args.mask, args.min_score)
        save_image(image, drawing, "make room, or give another --output")
        print(f"drawn in {shown(drawing, 1000)}", file=sys.stderr)


def main():
    """-> the exit code: 0, or 1 if an image of several could not be read."""
    args = arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack an expression's letters
    images = list_images(args.images)
    grounder = Grounder.from_pretrained(args.weights, args.device, args.dtype)
    several = len(images) > 1 or os.path.isdir(args.images[0])
    drawings = drawing_paths(args, images, several)
    masks = mask_paths(args, images)
    refuse_to_overwrite(images, [*drawings, *chain.from_iterable(masks)])
    progress = Progress("grounded", len(images))
    warnings = chain.from_iterable(grounder.warnings(expression) for expression in dict.fromkeys(args.expression))
    code = 0
    for number, image in enumerate(images):
        try:
            results = grounder.ground(image, args.expression, attention=args.heatmap == "attention")
        except ImageError as error:
            if not several:
                raise
            print(f"error: {error}", file=sys.stderr)
            code = 1
            continue
        for line in warnings:  # all of them with the first image
            print(f"warning: {line}", file=sys.stderr)
        report(args, image, results)
        write_files(args, results, drawings[number], masks[number])
        if several:
            progress(number + 1)
    return code


def start():
    """The command `hivg-ground`."""
    run(main)


if __name__ == "__main__":
    start()
