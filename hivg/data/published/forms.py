"""The forms in which programs write a box's four numbers, and files that are written in another form than they mean."""

from collections import Counter

SLACK = 1.0  # pixels by which a box may reach out of its image; annotators' boxes do
NEARLY_ALL = 0.9  # of a file's boxes
FORMS = {  # the first two are read; {name: (the four numbers, to xmin, ymin, xmax, ymax)}
    "xyxy": ("xmin ymin xmax ymax", lambda a, b, c, d: (a, b, c, d)),
    "xywh": ("x y width height", lambda x, y, w, h: (x, y, x + w, y + h)),
    "yxyx": ("ymin xmin ymax xmax", lambda a, b, c, d: (b, a, d, c)),  # TensorFlow's
    "centre": ("x and y of the centre, width, height", lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2)),
}


def other_form(boxes):
    """The form that boxes seem to be in, and the first box that says so, or None where they are in the right one.

    boxes: [(four numbers, the form they should be in, the width and height of the image)]. They are in another form if
    most lie in 0..1 (shares of the sides), if more of them, and nearly all, lie in their images in another of FORMS, or
    if most reach well beyond their images, but not beyond 1000 (thousandths). A box that rounding left without area is
    in the right form, and one wrong box in ten is a typo.
    """
    # whole numbers are pixels: 0 0 1 1 is a box of one
    shares = [box for box, _, _ in boxes if 0 <= min(box) and max(box) <= 1 and not all(map(float.is_integer, box))]
    if 2 * len(shares) > len(boxes):
        return "shares of the sides, 0 to 1", shares[0]
    wrong = [(box, size) for box, form, size in boxes if not is_within(box, form, size)]
    # one box with its sides swapped may be any typo
    forms = [name for name in FORMS if name != "yxyx" or len(wrong) > 1]
    fits = Counter(name for box, _, size in boxes for name in forms if is_within(box, name, size))
    likely, most = max(fits.items(), key=lambda item: item[1], default=(None, 0))
    are_typos = len(wrong) <= (1 - NEARLY_ALL) * len(boxes)
    if most > len(boxes) - len(wrong) and most >= NEARLY_ALL * len(boxes) and not are_typos:
        return FORMS[likely][0], wrong[0][0]
    beyond = [box for box, (width, height) in wrong if 0 <= min(box) and max(box) <= 1000 and is_ordered(box)
              and max(box[2] / width, box[3] / height) > 1.1]
    if len(beyond) > max(1, len(boxes) / 2):
        return "thousandths of the sides, 0 to 1000 (or the images were made smaller)", beyond[0]
    return None


def scale_doubt(boxes):
    """A line on boxes that are read as pixels, but may be percent or thousandths of the sides: all of twenty or more
    lie in 0..100 or 0..1000, while most images are far larger. None where there is no such doubt.

    boxes: [((xmin, ymin, xmax, ymax), (width, height) of the image)]. It is no error, as small images may have been
    pasted into the corner of large ones.
    """
    largest = max((max(box) for box, _ in boxes), default=0)
    for most, unit in ((100, "percent"), (1000, "thousandths")):
        larger = [size for _, size in boxes if min(size) > 1.5 * most]
        if largest <= most and len(boxes) >= 20 and 2 * len(larger) > len(boxes):
            return (f"all boxes lie in 0..{most} of images as large as {larger[0][0]} x {larger[0][1]}, and are read "
                    f"as pixels; if they are {unit} of the sides, write pixels")
    return None


def is_odd(bbox, form):
    """Whether a box as a file has it makes that file worth a look (other_form), whatever its image."""
    try:
        return max(bbox) <= 1 or form == "xyxy" and not is_ordered(bbox)
    except (TypeError, ValueError, OverflowError, LookupError):  # told where the row is read
        return False


def is_within(box, form, size):
    """Whether a box in this form has no negative side and lies in an image of (width, height), give or take a pixel."""
    corners = FORMS[form][1](*box)
    return (is_ordered(corners) and min(corners[:2]) >= -SLACK and corners[2] <= size[0] + SLACK
            and corners[3] <= size[1] + SLACK)


def is_ordered(box):
    return box[2] >= box[0] - SLACK and box[3] >= box[1] - SLACK


def four_numbers(bbox, own):
    """A box as a file has it -> four floats. Raises TypeError, ValueError or OverflowError (an integer beyond all
    floats). Text like "12", or `true`, is not a number in people's own data; published lists may have such, as the
    released program accepts them."""
    if not isinstance(bbox, list | tuple) or own and any(isinstance(value, str | bool) for value in bbox):
        raise TypeError
    a, b, c, d = (float(value) for value in bbox)
    return a, b, c, d
