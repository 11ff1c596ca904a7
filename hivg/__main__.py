"""Ground expressions in images: print the boxes and draw them.

    python ground.py                                     a bundled image, with the bundled weights
    python ground.py drawing.png -e "the last star"      your own; repeat -e for several expressions
    python ground.py folder/ -e "the red star" --json    every image of a folder, one line of JSON for each
    python ground.py --page                              type and see, in the browser

Once hivg is installed (`pip install .`), the same command is also called hivg-ground.
"""

import json
import os
import sys
import unicodedata
from itertools import chain
from pathlib import Path

from PIL import Image

from hivg.data.images import ImageError
from hivg.grounder import DEFAULT_WEIGHTS, HEATMAPS, Grounder, draw_results
from hivg.utils.cli import Parser, Progress, add_machine_flags, run
from hivg.utils.files import image_format, refuse_to_replace, save_image
from hivg.utils.memory import enough_memory
from hivg.utils.messages import quoted, shown
from hivg.weights import bundled, located

EXAMPLE = bundled("example.png")
EXAMPLE_EXPRESSION = "the star left of the blue square"
PORT = 8765  # of the page
OF_PAGE = ("page", "port", "weights", "device", "dtype")  # flags that go with --page
REPLACING = "give another --output or --save_masks"
LOWER = "make the image smaller, or give fewer expressions at a time"  # where memory runs out
UNREADABLE = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS")  # Pillow cannot read these, or would run EPS


def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="images or folders of images")
    parser.add_argument("-e", "--expression", action="append", metavar="TEXT", help="what to find; may be repeated")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, metavar="FILE", help="a HiVG weights file")
    parser.add_argument("--output", metavar="PATH", help="where to draw (default: grounded.png); a folder for several "
                        "images (default: grounded/) or if it ends in /")
    parser.add_argument("--heatmap", choices=HEATMAPS, help="draw a heat map of the first expression: tokens, how much "
                        "each patch belongs to the object (the default); attention, what the token that predicts "
                        "the box attends to; words, which word each patch reads most in each bridge, without boxes")
    parser.add_argument("--mask", action="store_true", help="draw the mask of the first expression")
    parser.add_argument("--save_masks", metavar="FOLDER", help="write the mask of each expression as a black and white "
                        "PNG: NAME-1.png, NAME-2.png for the expressions of NAME.jpg")
    parser.add_argument("--min_score", type=float, default=0.0, metavar="S", help="0 to 1: a result that scores less "
                        "counts as not found, without a box or a mask; a heat map is still drawn")
    parser.add_argument("--json", action="store_true", help="print a line of JSON per image; draw only with --output")
    parser.add_argument("--rle", action="store_true", help="with --json: also masks, as COCO's compressed run lengths")
    parser.add_argument("--page", action="store_true", help="serve a page on this machine to drop images on and type "
                        "expressions in; its address is printed")
    parser.add_argument("--port", type=int, metavar="N", help=f"with --page: its port (default: {PORT}); 0 for any "
                        "that is free")
    add_machine_flags(parser)
    words = without_dashes(with_heatmap_named(sys.argv[1:]))
    args = parser.parse_intermixed_args(words)  # images before or after -e
    if args.page:
        needless = [name for name, value in vars(args).items() if value and name not in OF_PAGE]
        if needless:
            names = ["IMAGE" if name == "images" else f"--{name}" for name in needless]
            parser.error(f"--page takes images and expressions in the browser; leave out {', '.join(names)}")
        args.port = PORT if args.port is None else args.port
        if not 0 <= args.port < 65536:
            parser.error(f"--port must be from 0 to 65535, not {quoted(args.port)}")
        return args
    if args.port is not None:
        parser.error("--port needs --page")
    if args.expression and not args.images:
        parser.error("an expression, but no image; name an image")
    if args.images and not args.expression:
        parser.error('an image, but no expression; add -e "the object to find"')
    if not 0 <= args.min_score <= 1:
        parser.error(f"--min_score must be from 0 to 1, not {args.min_score}")
    if "" in (args.output, args.save_masks):
        parser.error("--output and --save_masks must name a file or folder, not be empty")
    if args.heatmap == "words" and args.mask:
        parser.error("--heatmap words and --mask are two drawings; ask for one of them")
    if args.json and not args.output and (args.mask or args.heatmap):
        parser.error("--mask and --heatmap are drawn; with --json give --output too, or --rle for masks in the JSON")
    if args.rle and not args.json:
        parser.error("--rle needs --json; for PNG files use --save_masks FOLDER")
    if not args.images:
        args.images = [short_path(EXAMPLE)]
        args.expression = [EXAMPLE_EXPRESSION]
    return args


def with_heatmap_named(words):
    """The command line with --heatmap=tokens where no name follows --heatmap: argparse's nargs="?" would take the
    image after it for the name."""
    named = list(words)
    for i, word in enumerate(words):
        after = "".join(words[i + 1 : i + 2])
        is_file = not after or after.startswith("-") or os.path.splitext(after)[1] or os.path.exists(after)
        if word == "--heatmap" and after not in HEATMAPS and is_file:  # anything else is a name, if a wrong one
            named[i] = "--heatmap=tokens"
    return named


def without_dashes(words):
    """The command line with ./-a.png for what follows -- and begins with a dash, as argparse takes it for a flag."""
    end = words.index("--") if "--" in words else len(words)
    return words[:end] + [os.path.join(".", name) if name.startswith("-") else name for name in words[end + 1 :]]


def short_path(path):
    """Relative to the current folder, if there is such a path; on Windows there is none to another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def list_images(names):
    """Files as given, folders as their images, sorted by name. Raises ImageError for a folder without images."""
    paths = []
    for name in names:
        if not os.path.isdir(name):  # unlike Path.is_dir, False for a name that no file can have
            if name and "." not in name and not os.path.exists(name):  # rather the second word of an expression
                advice = "check the path, and put an expression of several words in quotes"
                if name == "-":
                    advice = "to read a program's output, name /dev/stdin"
                raise ImageError(f"{shown(name)}: there is no such file; {advice}")
            paths.append(str(name))
            continue
        formats = Image.registered_extensions()  # {suffix: format}; the first call imports all of them
        suffixes = {suffix for suffix, name in formats.items() if name in Image.OPEN and name not in UNREADABLE}
        try:
            visible = [path for path in Path(name).iterdir() if not path.name.startswith(".")]
            inside = sorted(path for path in visible if path.suffix.lower() in suffixes and not path.is_dir())
        except OSError as error:
            raise ImageError(f"{shown(name)}: cannot be listed ({error.strerror}); check the folder") from None
        if not inside:
            raise ImageError(f"{shown(name)}: no image in this folder; name a folder with PNG or JPEG files")
        if skipped := sorted(set(visible) - set(inside)):
            print(f"warning: {shown(name)}: left out {len(skipped)} of {len(visible)}, which by their names are no "
                  f"images that can be read, for instance {shown(skipped[0].name, 60)}", file=sys.stderr)
        paths += map(str, inside)
    return paths


def names_of(images):
    """The names of image files without folder and suffix, numbered where several have the same: a, a-2, a-3."""
    names = {}  # in the order of the images: {what tells them apart on any disk: name}
    numbers = {}  # {stem: the last number it got}
    for image in images:
        name = stem = Path(image).stem
        while one_spelling(name) in names:
            numbers[stem] = numbers.get(stem, 1) + 1
            name = f"{stem}-{numbers[stem]}"
        names[one_spelling(name)] = name
    return list(names.values())


def one_spelling(name):
    """The same for all names that are one file on macOS or Windows: A and a, an accent as one letter or two."""
    return unicodedata.normalize("NFC", str(name)).casefold()


def drawing_paths(args, images, several):
    """A file for the drawing of each image; None for each with --json but no --output."""
    if args.json and not args.output:
        return [None] * len(images)
    output = args.output or ("grounded/" if several else "grounded.png")
    if several or os.path.isdir(output) or output.endswith(("/", os.sep)):
        return [Path(output, f"{name}.png") for name in names_of(images)]
    return [Path(output)]


def refuse_to_overwrite(images, targets):
    """Raises ValueError if a file to be written is one of the images, or if two of them are the same."""
    targets = [target for target in targets if target]
    if len({one_spelling(os.path.abspath(target)) for target in targets}) < len(targets):
        raise ValueError("a drawing would replace a mask; give --output and --save_masks different folders")
    refuse_to_replace(images, targets, REPLACING)


def report(args, image, results, note):
    """Print the results of one image. note: on their scores."""
    width, height = results[0].image.size
    if not args.json:
        print(f"{shown(image, 1000)} ({width} x {height})")
    entries = []
    for result in results:
        is_found = result.score >= args.min_score
        if args.json:
            entry = result.to_dict()
            entry["box"] = entry["box"] if is_found else None
            if args.rle:
                entry["mask"] = result.mask_rle() if is_found else None
            entries.append(entry)
        else:
            box = ", ".join(f"{v:.1f}" for v in result.box)
            found = f"box ({box})" if is_found else "nothing found"
            print(f"  {shown(result.expression, 1000)}: {found}, score {result.score:.2f}{note}", flush=True)
    if args.json:
        print(json.dumps({"image": image, "width": width, "height": height, "results": entries}), flush=True)


def main():
    """-> the exit code: 0, or 1 if one of several images could not be read."""
    args = arguments()
    if args.page:
        from hivg.page import serve  # not above: a web server takes a while to import

        def load():
            return Grounder.from_pretrained(args.weights, args.device, args.dtype)

        return serve(args.port, load, EXAMPLE, EXAMPLE_EXPRESSION)
    images = list_images(args.images)
    several = len(images) > 1 or os.path.isdir(args.images[0])
    drawings = drawing_paths(args, images, several)
    numbers = range(1, len(args.expression) + 1) if args.save_masks else []
    masks = [[Path(args.save_masks, f"{name}-{number}.png") for number in numbers] for name in names_of(images)]
    targets = [*drawings, *chain.from_iterable(masks)]
    refuse_to_overwrite(images, targets)
    refuse_to_replace([located(args.weights)], filter(None, targets), REPLACING, "weights")
    for folder in (args.output if several else None, args.save_masks):
        if folder and os.path.isfile(folder):
            raise ValueError(f"{shown(folder)}: is a file, a folder is needed; {REPLACING}")
    if drawings[0]:
        image_format(drawings[0])
    grounder = Grounder.from_pretrained(args.weights, args.device, args.dtype)
    progress = Progress("grounded", len(images))
    code = 0
    warned = set()
    for number, image in enumerate(images):
        try:
            with enough_memory(f"{shown(image, 150)}: ", LOWER):
                results = grounder.ground(image, args.expression, attention=args.heatmap in ("attention", "words"))
        except (ImageError, MemoryError) as error:
            if not several:
                raise
            print(f"error: {error}", file=sys.stderr)
            code = 1
            continue
        for n, result in enumerate(results):
            for line in grounder.warnings(result.expression, None if n else result.image):  # an image is judged once
                if line not in warned:  # once is enough
                    print(f"warning: {line}", file=sys.stderr)
                    warned.add(line)
        report(args, image, results, "" if grounder.calibration else ", uncalibrated")
        for result, path in zip(results, masks[number]):
            result.save_mask(path, args.min_score)
        if drawings[number]:
            drawing = draw_results(results, args.heatmap, args.mask, args.min_score)
            save_image(drawing, drawings[number], "make room, or give another --output")
            print(f"drawn in {shown(drawings[number], 1000)}", file=sys.stderr)
        if several:
            progress(number + 1)
    return code


def start():
    """The command `hivg-ground`."""
    run(main, lower=LOWER)


if __name__ == "__main__":
    start()
