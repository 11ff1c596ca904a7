"""Ground expressions in pictures: print the boxes and draw them.

    python ground.py                                     a bundled picture, with the bundled weights
    python ground.py photo.jpg -e "the man on the left"  your own; -e may be given several times
    python ground.py folder/ -e "the red star" --json    every picture of a folder, a JSON object a line
"""

import json
import os
import sys
from pathlib import Path

from PIL import Image

from hivg.grounder import DEFAULT_WEIGHTS, DTYPES, Grounder, ImageError, draw_results
from hivg.utils.cli import Parser, Progress, fail
from hivg.weights import WeightsError

EXAMPLE = Path(__file__).parent / "weights" / "example.png"
EXAMPLE_EXPRESSION = "the star left of the blue square"


def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures or folders of pictures")
    parser.add_argument("-e", "--expression", action="append", metavar="TEXT", help="what to find; may be repeated")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, metavar="FILE", help="a HiVG weights file")
    parser.add_argument("--output", type=Path, metavar="PATH", help="where the drawn picture goes (grounded.png); a "
                        "folder for several pictures (grounded/)")
    parser.add_argument("--heatmap", action="store_true", help="draw the token map of the first expression as well")
    parser.add_argument("--json", action="store_true", help="a JSON object a line on stdout; draws only with --output")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto (float32), float32 or bfloat16")
    args = parser.parse_args()
    if args.expression and not args.images:
        parser.error("an expression, but no picture; name a picture before -e")
    if args.images and not args.expression:
        parser.error('a picture, but no expression; add -e "what to find"')
    args.images, args.expression = args.images or [os.path.relpath(EXAMPLE)], args.expression or [EXAMPLE_EXPRESSION]
    return args


def list_pictures(names):
    """Files as they are, folders as their pictures by name. Raises ImageError for a folder that holds none."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = []
    for name in names:
        is_folder = os.path.isdir(name)  # unlike Path.is_dir, False for a name that no file can have
        inside = sorted(p for p in Path(name).iterdir() if p.suffix.lower() in known) if is_folder else [name]
        if not inside:
            raise ImageError(f"{name}: no picture in this folder; name a folder with PNG or JPEG files")
        paths += map(str, inside)
    return paths


def drawing_paths(args, images, several):
    """Where the drawing of each picture goes, each to a file of its own; None with --json and no --output."""
    if args.json and not args.output:
        return [None] * len(images)
    if not several and not (args.output and os.path.isdir(args.output)):
        return [args.output or Path("grounded.png")]
    folder, names = args.output or Path("grounded"), {}
    for stem in (Path(image).stem for image in images):
        name, number = stem, 1
        while name in names:  # two pictures of one name, say a.jpg and a.png
            number += 1
            name = f"{stem}-{number}"
        names[name] = True
    return [folder / f"{name}.png" for name in names]


def report(args, image, results):
    """Print the results of one picture."""
    width, height = results[0].image.size
    if args.json:
        row = {"image": image, "width": width, "height": height, "results": [r.to_dict() for r in results]}
        print(json.dumps(row), flush=True)
    else:
        print(f"{image} ({width} x {height})")
        for r in results:
            print(f"  {r.expression}: box ({', '.join(f'{v:.1f}' for v in r.box)}), score {r.score:.2f}", flush=True)


def main():
    args = arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # an expression need not fit the terminal's encoding
    try:
        images = list_pictures(args.images)
        grounder = Grounder.from_pretrained(args.weights, args.device, args.dtype)
    except (ImageError, WeightsError, ValueError) as error:
        fail(error)
    several, bad = len(images) > 1 or os.path.isdir(args.images[0]), 0
    targets, progress = drawing_paths(args, images, several), Progress("grounded", len(images))
    for image, target in zip(images, targets):
        if target and os.path.exists(image) and os.path.exists(target) and os.path.samefile(image, target):
            fail(f"{image}: the drawing would replace the picture; give another --output")
    for done, (image, target) in enumerate(zip(images, targets), 1):
        try:
            results = grounder.ground(image, args.expression)
        except ImageError as error:
            if not several:
                fail(error)
            print(f"error: {error}", file=sys.stderr)
            bad += 1
            continue
        except ValueError as error:
            fail(error)
        report(args, image, results)
        try:
            if target:
                target.parent.mkdir(parents=True, exist_ok=True)
                draw_results(results, heatmap=args.heatmap).save(target)
                print(f"drawn in {target}", file=sys.stderr)
        except (OSError, ValueError) as error:
            fail(f"{target}: the drawing cannot be written ({error}); give --output a .png path that can be")
        if several:
            progress(done)
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has had enough of it, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
