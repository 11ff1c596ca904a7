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
    parser.add_argument("--output", metavar="PATH", help="the drawn image (grounded.png); for several images, or "
                        "with a / at its end, a folder (grounded/)")
    parser.add_argument("--heatmap", choices=HEATMAPS, help="draw a heat map of the first expression as well: "
                        "tokens, the token map, also if no name follows; attention, where the token of the box looks")
    parser.add_argument("--mask", action="store_true", help="draw the mask of the first expression as well")
    parser.add_argument("--save_masks", metavar="FOLDER", help="write the mask of each expression as a PNG, white "
                        "where it is: NAME-1.png, NAME-2.png for the expressions of NAME.jpg")
    parser.add_argument("--min_score", type=float, default=0.0, metavar="S", help="0 to 1: below this score nothing "
                        "counts as found, so no box and no mask; a heat map is drawn all the same")
    parser.add_argument("--json", action="store_true", help="a JSON object a line on stdout; draws only with --output")
    parser.add_argument("--rle", action="store_true", help="with --json: masks too, as COCO's compressed run lengths")
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
    """As seen from the current folder, where there is such a path: not between two drives of Windows."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def with_heatmap_named(words):
    """The command line with the token map named where --heatmap has no name after it, but an image, say."""
    named = list(words)
    for i, word in enumerate(words):
        if word == "--heatmap" and "".join(words[i + 1 : i + 2]) not in HEATMAPS:
            named[i] = "--heatmap=tokens"
    return named


def list_images(names):
    """Files as they are, folders as their images, sorted by name. Raises ImageError for a folder without any."""
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
    """A file for the drawing of each image; None for each with --json and no --output."""
    if args.json and not args.output:
        return [None] * len(images)
    output = args.output or ("grounded/" if several else "grounded.png")
    if not several and not os.path.isdir(output) and not output.endswith(("/", os.sep)):
        return [Path(output)]
    folder = Path(output)
    return [folder / f"{name}.png" for name in names_of(images)]


def names_of(images):
    """The names of image files without folder and suffix, made unique."""
    names = {}  # {name: image}
    numbers = {}  # {name without its number: the last number}
    for image in images:
        stem = Path(image).stem
        name = stem
        while name in names:  # two images of one name, say a.jpg and a.png
            numbers[stem] = numbers.get(stem, 1) + 1
            name = f"{stem}-{numbers[stem]}"
        names[name] = image
    return list(names)


def mask_paths(args, images):
    """For each image a file for the mask of each expression; none for each without --save_masks."""
    if not args.save_masks:
        return [[]] * len(images)
    numbers = range(1, len(args.expression) + 1)
    paths = []
    for name in names_of(images):
        paths.append([Path(args.save_masks, f"{name}-{number}.png") for number in numbers])
    return paths


def refuse_to_overwrite(images, targets):
    """Raises ValueError if a file to be written is one of the images, or two are one."""
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
    """Where a file lies, (device, number on it), the same by whatever path; None if there is none."""
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
            if result.score < args.min_score:  # nothing is found
                entry["box"] = None
                if args.rle:
                    entry["mask"] = None
            entries.append(entry)
        print(json.dumps({"image": image, "width": width, "height": height, "results": entries}), flush=True)
        return
    print(f"{shown(image, 1000)} ({width} x {height})")
    for result in results:
        box = ", ".join(f"{v:.1f}" for v in result.box)
        found = f"box ({box})" if result.score >= args.min_score else "nothing found"
        print(f"  {shown(result.expression, 1000)}: {found}, score {result.score:.2f}", flush=True)


def save_drawing(args, results, target):
    drawing = draw_results(results, args.heatmap, args.mask, args.min_score)
    save_image(drawing, target, "make room, or give another --output")
    print(f"drawn in {shown(target, 1000)}", file=sys.stderr)


def save_masks(args, results, targets):
    for result, target in zip(results, targets):
        result.save_mask(target, args.min_score)


def main():
    """-> the exit code: 0, or 1 if an image of several could not be read."""
    args = arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may have no letters for an expression
    images = list_images(args.images)
    grounder = Grounder.from_pretrained(args.weights, args.device, args.dtype)
    several = len(images) > 1 or os.path.isdir(args.images[0])
    targets = drawing_paths(args, images, several)
    masks = mask_paths(args, images)
    refuse_to_overwrite(images, [*targets, *chain.from_iterable(masks)])
    progress = Progress("grounded", len(images))
    code = 0
    warned = False
    for number, image in enumerate(images, 1):
        try:
            results = grounder.ground(image, args.expression, attention=args.heatmap == "attention")
        except ImageError as error:
            if not several:
                raise
            print(f"error: {error}", file=sys.stderr)
            code = 1
            continue
        if not warned:
            warned = True
            for expression in dict.fromkeys(args.expression):
                for line in grounder.warnings(expression):
                    print(f"warning: {line}", file=sys.stderr)
        report(args, image, results)
        save_masks(args, results, masks[number - 1])
        if targets[number - 1]:
            save_drawing(args, results, targets[number - 1])
        if several:
            progress(number)
    return code


def start():
    """The command `hivg-ground`."""
    run(main)


if __name__ == "__main__":
    start()
