"""Ground expressions in images: print the boxes and draw them.

    python ground.py                                     a bundled image, with the bundled weights
    python ground.py photo.jpg -e "the man on the left"  your own; -e may be given several times
    python ground.py folder/ -e "the red star" --json    every image of a folder, a JSON object a line
"""

import json
import os
import sys
from pathlib import Path

from PIL import Image

from hivg.data.images import ImageError
from hivg.grounder import DEFAULT_WEIGHTS, DTYPES, Grounder, draw_results
from hivg.utils.cli import Parser, Progress, fail

EXAMPLE = Path(__file__).parent / "weights" / "example.png"
EXAMPLE_EXPRESSION = "the star left of the blue square"


def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="images or folders of images")
    parser.add_argument("-e", "--expression", action="append", metavar="TEXT", help="what to find; may be repeated")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, metavar="FILE", help="a HiVG weights file")
    parser.add_argument("--output", type=Path, metavar="PATH", help="the drawn image (grounded.png); for several "
                        "images a folder (grounded/)")
    parser.add_argument("--heatmap", action="store_true", help="draw the token map of the first expression as well")
    parser.add_argument("--json", action="store_true", help="a JSON object a line on stdout; draws only with --output")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto (float32), float32 or bfloat16")
    args = parser.parse_args()
    if args.expression and not args.images:
        parser.error("an expression, but no image; name an image before -e")
    if args.images and not args.expression:
        parser.error('an image, but no expression; add -e "the object to find"')
    if not args.images:
        args.images = [os.path.relpath(EXAMPLE)]
        args.expression = [EXAMPLE_EXPRESSION]
    return args


def list_images(names):
    """Files as they are, folders as their images, sorted by name. Raises ImageError for a folder without any."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = []
    for name in names:
        if not os.path.isdir(name):  # unlike Path.is_dir, False for a name that no file can have
            paths.append(str(name))
            continue
        inside = sorted(path for path in Path(name).iterdir() if path.suffix.lower() in suffixes)
        if not inside:
            raise ImageError(f"{name}: no image in this folder; name a folder with PNG or JPEG files")
        paths += [str(path) for path in inside]
    return paths


def drawing_paths(args, images, several):
    """A file for the drawing of each image; None for each with --json and no --output."""
    if args.json and not args.output:
        return [None] * len(images)
    if not several and not (args.output and os.path.isdir(args.output)):
        return [args.output or Path("grounded.png")]
    folder = args.output or Path("grounded")
    names = []
    for image in images:
        stem = Path(image).stem
        name = stem
        number = 1
        while name in names:  # two images of one name, say a.jpg and a.png
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return [folder / f"{name}.png" for name in names]


def refuse_to_overwrite(images, targets):
    for image, target in zip(images, targets):
        if target and os.path.exists(image) and os.path.exists(target) and os.path.samefile(image, target):
            fail(f"{image}: the drawing would replace the image; give another --output")


def report(args, image, results):
    """Print the results of one image."""
    width, height = results[0].image.size
    if args.json:
        row = {"image": image, "width": width, "height": height, "results": [r.to_dict() for r in results]}
        print(json.dumps(row), flush=True)
        return
    print(f"{image} ({width} x {height})")
    for result in results:
        box = ", ".join(f"{v:.1f}" for v in result.box)
        print(f"  {result.expression}: box ({box}), score {result.score:.2f}", flush=True)


def save_drawing(args, results, target):
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_results(results, heatmap=args.heatmap).save(target)
    except (OSError, ValueError) as error:
        fail(f"{target}: the drawing cannot be written ({error}); give --output a .png path that can be")
    print(f"drawn in {target}", file=sys.stderr)


def main():
    """-> the exit code: 0, or 1 if an image of several could not be read."""
    args = arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may have no letters for an expression
    try:
        images = list_images(args.images)
        grounder = Grounder.from_pretrained(args.weights, args.device, args.dtype)
    except ValueError as error:  # ImageError and WeightsError are such
        fail(error)
    several = len(images) > 1 or os.path.isdir(args.images[0])
    targets = drawing_paths(args, images, several)
    refuse_to_overwrite(images, targets)
    progress = Progress("grounded", len(images))
    code = 0
    for number, (image, target) in enumerate(zip(images, targets), 1):
        try:
            results = grounder.ground(image, args.expression)
        except ImageError as error:
            if not several:
                fail(error)
            print(f"error: {error}", file=sys.stderr)
            code = 1
            continue
        except ValueError as error:
            fail(error)
        report(args, image, results)
        if target:
            save_drawing(args, results, target)
        if several:
            progress(number)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
