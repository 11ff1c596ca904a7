"""Ground expressions in pictures: print the boxes and draw them.

    python ground.py                                     a bundled picture, with the bundled weights
    python ground.py photo.jpg -e "the man on the left"  your own; -e may be given several times
    python ground.py folder/ -e "the red star" --json    every picture of a folder, a JSON object a line
"""

import json
import sys
from pathlib import Path

from PIL import Image

from hivg.cli import Parser, Progress, fail
from hivg.grounder import DEFAULT_WEIGHTS, DTYPES, Grounder, ImageError, draw_results
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
    args.images, args.expression = args.images or [str(EXAMPLE)], args.expression or [EXAMPLE_EXPRESSION]
    return args


def list_pictures(names):
    """Files as they are, folders as their pictures by name. Raises ImageError for a folder that holds none."""
    known, paths = Image.registered_extensions(), []
    for name in names:
        inside = sorted(p for p in Path(name).iterdir() if p.suffix.lower() in known) if Path(name).is_dir() else [name]
        if not inside:
            raise ImageError(f"{name}: no picture in this folder; name a folder with PNG or JPEG files")
        paths += map(str, inside)
    return paths


def output_path(args, image, several):
    """Where the drawing of this picture goes; None with --json and no --output."""
    if args.json and not args.output:
        return None
    if several or (args.output and args.output.is_dir()):
        return (args.output or Path("grounded")) / f"{Path(image).stem}.png"
    return args.output or Path("grounded.png")


def report(args, image, results, target):
    """Print the results of one picture, and draw them."""
    width, height = results[0].image.size
    if args.json:
        row = {"image": image, "width": width, "height": height, "results": [r.to_dict() for r in results]}
        print(json.dumps(row, ensure_ascii=False), flush=True)
    else:
        print(f"{image} ({width} x {height})")
        for r in results:
            print(f"  {r.expression}: box ({', '.join(f'{v:.1f}' for v in r.box)}), score {r.score:.2f}")
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_results(results, heatmap=args.heatmap).save(target)
        print(f"drawn in {target}", file=sys.stderr)


def main():
    args = arguments()
    try:
        images = list_pictures(args.images)
        grounder = Grounder.from_pretrained(args.weights, args.device, args.dtype)
    except (ImageError, WeightsError, ValueError) as error:
        fail(error)
    several, bad = len(images) > 1 or Path(args.images[0]).is_dir(), 0
    progress = Progress("grounded", len(images))
    for done, image in enumerate(images, 1):
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
        target = output_path(args, image, several)
        try:
            report(args, image, results, target)
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
