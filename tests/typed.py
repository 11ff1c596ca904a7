"""What people type: phrases and scenes that are none of the training's, and how often a model is right about them.

    python -m tests.typed [--weights FILE] [--scenes 100]

The scenes are drawn here, by Pillow's own figures on plain paper, in colours of their own. Prints for each row how
often the box is right (IoU 0.5 or more) and the median score; of what is not there, how often it is below 0.5.
"""

import math
import random
import statistics

from PIL import Image, ImageColor, ImageDraw

from hivg import Grounder
from hivg.grounder import DEFAULT_WEIGHTS
from hivg.utils.cli import Parser, run

COLOURS = {"red": "#d2232a", "green": "#1f8a3c", "blue": "#2a4fd0", "orange": "#f07c10", "purple": "#7a2a9a",
           "black": "#1c1c20", "pink": "#e554a4", "brown": "#7c4a22"}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "arrow")
WIDTH, HEIGHT = 360, 240
FINE = 3  # drawn so many times as large, then reduced
NUMBERS = ("first", "second", "third", "fourth", "fifth", "sixth")


# ---- drawing

def outline(shape, x, y, w, h):
    """The corners of a figure of w x h around (x, y)."""
    if shape == "star":
        angles = [math.pi * k / 5 for k in range(10)]
        points = [((0.5, 0.21)[k % 2] * math.sin(a), -(0.5, 0.21)[k % 2] * math.cos(a)) for k, a in enumerate(angles)]
    elif shape == "heart":
        turns = [2 * math.pi * k / 60 for k in range(60)]
        points = [(math.sin(t) ** 3 / 2, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
                                           - math.cos(4 * t)) / 32) for t in turns]
    else:
        points = {
            "square": [(-.45, -.45), (.45, -.45), (.45, .45), (-.45, .45)],
            "bar": [(-.5, -.5), (.5, -.5), (.5, .5), (-.5, .5)],
            "triangle": [(0, -.5), (.5, .4), (-.5, .4)],
            "diamond": [(0, -.5), (.38, 0), (0, .5), (-.38, 0)],
            "cross": [(-.16, -.5), (.16, -.5), (.16, -.16), (.5, -.16), (.5, .16), (.16, .16), (.16, .5), (-.16, .5),
                      (-.16, .16), (-.5, .16), (-.5, -.16), (-.16, -.16)],
            "arrow": [(-.5, -.14), (.08, -.14), (.08, -.4), (.5, 0), (.08, .4), (.08, .14), (-.5, .14)],
        }[shape]
    return [((x + w * px) * FINE, (y + h * py) * FINE) for px, py in points]


def draw(things, paper="#f1efe8", size=(WIDTH, HEIGHT)):
    """things: (shape, colour, x, y, width, height, filled) -> (image, a box for each)."""
    image = Image.new("RGB", (size[0] * FINE, size[1] * FINE), paper)
    canvas = ImageDraw.Draw(image)
    boxes = []
    for shape, colour, x, y, w, h, filled in things:
        rgb = ImageColor.getrgb(COLOURS[colour])
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        line = int(0.13 * min(w, h) * FINE)
        if shape == "circle":
            canvas.ellipse([FINE * v for v in box], rgb if filled else None, rgb, line)
        else:
            points = outline(shape, x, y, w, h)
            canvas.polygon(points, rgb if filled else None, rgb, line)
            xs, ys = zip(*points)
            box = tuple(v / FINE for v in (min(xs), min(ys), max(xs), max(ys)))
        boxes.append(box)
    return image.resize(size, Image.Resampling.LANCZOS), boxes


def scattered(rng, looks, size=(38, 62)):
    """Things of these (shape, colour), apart from each other."""
    while True:
        things = []
        for shape, colour in looks:
            side = rng.uniform(*size)
            for _ in range(60):
                x, y = rng.uniform(35, WIDTH - 35), rng.uniform(35, HEIGHT - 35)
                if all(math.hypot(x - t[2], y - t[3]) > 0.6 * (side + t[4]) + 6 for t in things):
                    things.append((shape, colour, x, y, side, side, True))
                    break
        if len(things) == len(looks):
            return things


def row(rng, shape, n, colours, others=()):
    """n of a shape from left to right, about level, then others anywhere free."""
    side = min(48, 250 / n)
    step = WIDTH / (n + 0.6)
    y = rng.uniform(60, 110)
    things = [(shape, colour, step * (k + 0.8) + rng.uniform(-3, 3), y + rng.uniform(-8, 8), side, side, True)
              for k, colour in enumerate(colours)]
    for k, (other, colour) in enumerate(others):
        things.append((other, colour, WIDTH * (k + 0.6) / (len(others) + 0.2), 190, side, side, True))
    return things


def two(rng, values):
    return rng.sample(list(values), 2)


# ---- rows of the table: each a function of a random generator -> (things, phrase, number of the one meant or None, and
# the image's size if it is another)

def ranked(n, rank):
    def make(rng):
        shape, other = two(rng, SHAPES)
        colours = [rng.choice(list(COLOURS))] * n if rng.random() < 0.5 else rng.choices(list(COLOURS), k=n)
        things = row(rng, shape, n, colours, [(other, rng.choice(list(COLOURS)))] * rng.randrange(3))
        from_left = rng.random() < 0.5
        place = rank if from_left else n + 1 - rank
        words = "left" if from_left else "right"
        return things, f"the {NUMBERS[rank - 1]} {shape} from the {words}", place - 1
    return make


def stacked(n, rank):
    """The same from the top, one below another."""
    def make(rng):
        shape = rng.choice(SHAPES)
        side = min(40, 170 / n)
        things = [(shape, rng.choice(list(COLOURS)), WIDTH / 2 + rng.uniform(-8, 8), HEIGHT * (k + 0.5) / n, side, side,
                   True) for k in range(n)]
        return things, f"the {NUMBERS[rank - 1]} {shape} from the top", rank - 1
    return make


def sized(phrase, *sides):
    """Some of a shape, one of each size, and another shape; the first is meant."""
    def make(rng):
        shape, other = two(rng, SHAPES)
        xs = rng.sample((50, 135, 225, 310), len(sides) + 1)
        things = [(kind, rng.choice(list(COLOURS)), x, rng.uniform(80, 160), side, side, True)
                  for kind, x, side in zip([shape] * len(sides) + [other], xs, (*sides, 48))]
        return things, phrase.format(shape=shape), 0
    return make


def cornered(rng):
    """One of a shape in each corner."""
    shape = rng.choice(SHAPES)
    spots = {f"{up} {side}": (x, y) for up, y in (("top", 50), ("bottom", HEIGHT - 50))
             for side, x in (("left", 55), ("right", WIDTH - 55))}
    things = [(shape, rng.choice(list(COLOURS)), x + rng.uniform(-20, 20), y + rng.uniform(-15, 15), 46, 46, True)
              for x, y in spots.values()]
    which = rng.randrange(4)
    return things, f"the {shape} in the {list(spots)[which]} corner", which


def readme(rng):
    colours = two(rng, COLOURS)
    return row(rng, "star", 2, colours, [("circle", "blue")]), "the second star from the left", 1


def middle(rng):
    shape, other = two(rng, SHAPES)
    return row(rng, shape, 3, rng.choices(list(COLOURS), k=3), [(other, "blue")]), f"the middle {shape}", 1


def last(rng):
    n = rng.randrange(2, 6)
    shape, other = two(rng, SHAPES)
    things = row(rng, shape, n, rng.choices(list(COLOURS), k=n), [(other, "red")])
    return things, f"the last {shape} from the left", n - 1


def negated(phrase):
    def make(rng):
        shape, other = two(rng, SHAPES)
        colour, own = two(rng, COLOURS)
        looks = [(shape, own), (shape, colour), (shape, colour), (other, rng.choice(list(COLOURS)))]
        return scattered(rng, looks), phrase.format(shape=shape, colour=colour), 0
    return make


def plain(phrase="the {colour} {shape}", shapes=SHAPES, size=(38, 62)):
    """One colour and shape among things that share either."""
    def make(rng):
        shape = rng.choice(shapes)
        other = rng.choice([s for s in SHAPES if s != shape])
        colour, another = two(rng, COLOURS)
        looks = [(shape, colour), (shape, another), (other, colour), (other, another)]
        return scattered(rng, looks, size), phrase.format(colour=colour, shape=shape), 0
    return make


def alone(rng):
    """One thing that nearly fills a square image."""
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    side = rng.uniform(0.8, 0.9) * HEIGHT
    x, y = (rng.uniform(0.52 * side, HEIGHT - 0.52 * side) for _ in "xy")
    return [(shape, colour, x, y, side, side, True)], f"the {colour} {shape}", 0, (HEIGHT, HEIGHT)


def upright(make):
    """A row in an image that is higher than wide."""
    def turned(rng):
        things, phrase, target = make(rng)
        k = HEIGHT / WIDTH  # of x, and of the things' own size
        things = [(s, c, k * x, y + HEIGHT / 4, k * w, k * h, filled) for s, c, x, y, w, h, filled in things]
        return things, phrase, target, (HEIGHT, WIDTH)
    return turned


def named(words, shape=None, colour=None, filled=True):
    """Another word for a shape or a colour."""
    def make(rng):
        own = shape or rng.choice(SHAPES)
        paint = colour or rng.choice(list(COLOURS))
        other = rng.choice([s for s in SHAPES if s != own])
        another = rng.choice([c for c in COLOURS if c != paint])
        things = scattered(rng, [(own, paint), (other if shape else own, another), (other, another)])
        things[0] = (*things[0][:6], filled)
        return things, words.format(shape=own, colour=paint), 0
    return make


def typo(rng):
    things, phrase, target = plain()(rng)
    word = max(phrase.split(), key=len)
    k = rng.randrange(1, len(word) - 1)
    return things, phrase.replace(word, word[:k] + word[k + 1] + word[k] + word[k + 2:]), target


def bar(rng):
    colour, another = two(rng, COLOURS)
    things = scattered(rng, [("square", another), ("circle", colour), ("star", another)], (34, 44))
    w, h = (rng.uniform(150, 200), 0) if rng.random() < 0.5 else (0, rng.uniform(110, 150))
    w, h = w or h / 6, h or w / 6
    while True:
        x, y = rng.uniform(w / 2 + 5, WIDTH - w / 2 - 5), rng.uniform(h / 2 + 5, HEIGHT - h / 2 - 5)
        if all(abs(x - t[2]) > (w + t[4]) / 2 or abs(y - t[3]) > (h + t[5]) / 2 for t in things):
            return [*things, ("bar", colour, x, y, w, h, True)], f"the {colour} bar", 3
        things = scattered(rng, [t[:2] for t in things], (34, 44))


def related(rng):
    shape, anchor = two(rng, SHAPES)
    a, b, c = rng.sample(list(COLOURS), 3)
    xs = sorted(rng.sample(range(50, WIDTH - 50, 62), 3))
    things = [(s, k, x, rng.uniform(60, HEIGHT - 60), 50, 50, True)
              for s, k, x in zip((shape, anchor, shape), (a, b, c), xs)]
    left = rng.random() < 0.5
    return things, f"the {shape} {'left' if left else 'right'} of the {anchor}", 0 if left else 2


def absent(kind):
    def make(rng):
        shape, other, gone = rng.sample(SHAPES, 3)
        colour, another, missing = rng.sample(list(COLOURS), 3)
        things = scattered(rng, [(shape, colour), (other, another), (shape, another), (other, colour)])
        phrase = {"shape": f"the {colour} {gone}", "colour": f"the {missing} {shape}",
                  "anchor": f"the {shape} left of the {gone}", "rank": f"the fifth {shape} from the left"}[kind]
        return things, phrase, None
    return make


ROWS = {
    "the red star, among others": plain(), "the red star, all things small": plain(size=(18, 24)),
    "the red star, alone, filling the image": alone, "the star left of the heart": related,
    **{f"the {NUMBERS[rank - 1]} star from the left, of {n}": ranked(n, rank)
       for n in range(2, 7) for rank in range(1, n + 1)},
    "the second star from the left, of two and a circle": readme, "the last star from the left, of two to five": last,
    "the middle square, of three": middle, "the third star from the top, of 3": stacked(3, 3),
    "the fourth star from the top, of 5": stacked(5, 4),
    "the third star from the left, of 4 in a tall image": upright(ranked(4, 3)),
    "the star in the top left corner": cornered,
    "the small star": sized("the small {shape}", 32, 66), "the big star": sized("the big {shape}", 66, 32),
    "the smaller star, of two": sized("the smaller {shape}", 32, 66),
    "the smallest star, of three": sized("the smallest {shape}", 32, 48, 66),
    "the largest star, of three": sized("the largest {shape}", 66, 48, 32),
    "the medium star, of three": sized("the medium {shape}", 46, 32, 66),
    "the star that is not red": negated("the {shape} that is not {colour}"),
    "the star that isn't red": negated("the {shape} that isn't {colour}"),
    "not the red star": negated("the {shape}, not the {colour} one"),
    "the star other than the red ones": negated("the {shape} other than the {colour} ones"), "a bar of 6 : 1": bar,
    "disc": named("the {colour} disc", "circle"), "box": named("the {colour} box", "square"),
    "ring": named("the ring", "circle", filled=False), "crimson": named("the crimson {shape}", colour="red"),
    "plural": plain("the {colour} {shape}s"), "one typo": typo,
    "where is the red star?": plain("where is the {colour} {shape}?"),
    "please click on the red star": plain("please click on the {colour} {shape}"),
    "can you show me the red star": plain("can you show me the {colour} {shape}"),
    "draw a box around the red star": plain("draw a box around the {colour} {shape}"),
}
NOTHING = {"an absent shape": absent("shape"), "an absent colour": absent("colour"),
           "an absent anchor": absent("anchor"), "the fifth of two": absent("rank")}
PAPERS = {"dark paper": "#23242b", "grey paper": "#808080"}


# ---- the table

def overlap(a, b):
    """IoU of two boxes xyxy."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return w * h / (sum(areas) - w * h)


def tried(grounder, make, scenes, paper="#f1efe8"):
    """-> (for each scene whether the box is right, the scores)."""
    images, phrases, wanted = [], [], []
    for number in range(scenes):
        things, phrase, target, *size = make(random.Random(number))
        if paper != "#f1efe8":  # black does not show on the dark
            things = [(s, "orange" if c == "black" else c, *rest) for s, c, *rest in things]
            phrase = phrase.replace("black", "orange")
        image, boxes = draw(things, paper, *size)
        images.append(image)
        phrases.append(phrase)
        wanted.append(None if target is None else boxes[target])
    results = grounder.ground_pairs(images, phrases)
    right = [box is not None and overlap(r.box, box) >= 0.5 for r, box in zip(results, wanted)]
    return right, [r.score for r in results]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", default=str(DEFAULT_WEIGHTS), metavar="FILE")
    parser.add_argument("--scenes", type=int, default=100, help="of each row; default: 100")
    args = parser.parse_args()
    grounder = Grounder.from_pretrained(args.weights, dtype="float32")
    print("| typed | right | median score |\n| --- | --- | --- |")
    for name, make in ROWS.items():
        right, scores = tried(grounder, make, args.scenes)
        print(f"| {name} | {statistics.mean(right):.2f} | {statistics.median(scores):.2f} |", flush=True)
    for name, paper in PAPERS.items():
        right, scores = tried(grounder, ROWS["the red star, among others"], args.scenes, paper)
        print(f"| the red star, on {name} | {statistics.mean(right):.2f} | {statistics.median(scores):.2f} |")
    print("| nothing there | scored below 0.5 | median score |\n| --- | --- | --- |")
    for name, make in NOTHING.items():
        _, scores = tried(grounder, make, args.scenes)
        print(f"| {name} | {statistics.mean(s < 0.5 for s in scores):.2f} | {statistics.median(scores):.2f} |")


if __name__ == "__main__":
    run(main)
