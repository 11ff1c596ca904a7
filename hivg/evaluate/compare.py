"""Where two models differ on the same samples, and whether that is significant: two files of --per_sample."""

import json

from hivg.evaluate.metrics import accuracy, mcnemar, present
from hivg.utils.messages import shown


def compare(path_a, path_b):
    """The text of --compare: two per-sample files of the same samples. Raises ValueError."""
    a = rows_of(path_a)
    b = rows_of(path_b)
    if not a:
        raise ValueError(f"{shown(path_a, 80)}: has no rows; give a file that --per_sample wrote")
    if samples_of(a) != samples_of(b):
        raise ValueError(f"{shown(path_a, 80)} ({len(a):,} rows) and {shown(path_b, 80)} ({len(b):,}) are not of the "
                         "same samples; evaluate both on the same split")
    left_out = len(a) - len(present(a))
    a, b = present(a), present(b)
    if not a:
        raise ValueError(f"{shown(path_a, 80)}: all {left_out} expressions are true of nothing, so no box can be right")
    only_a = [(x, y) for x, y in zip(a, b) if x["iou"] >= 0.5 > y["iou"]]  # pairs that the first alone has right
    only_b = [(x, y) for x, y in zip(a, b) if y["iou"] >= 0.5 > x["iou"]]
    p = mcnemar(len(only_a), len(only_b))
    lines = [
        f"Acc@0.5 {accuracy(row['iou'] for row in a):.4f} {shown(path_a, 300)}",
        f"Acc@0.5 {accuracy(row['iou'] for row in b):.4f} {shown(path_b, 300)}",
        f"{len(a)} samples: {len(only_a)} right in the first alone, {len(only_b)} in the second alone; McNemar's p = "
        f"{p:.3g}: {'' if p < 0.05 else 'not '}significant at 5 %",
    ]
    if left_out:
        lines.append(f"left out: {left_out} expressions that are true of nothing")
    for name, pairs in (("first", only_a), ("second", only_b)):
        for x, y in pairs:
            lines.append(f"  right in the {name} alone: {shown(x['image'], 300)}: {shown(x['expression'], 300)} "
                         f"(IoU {x['iou']:.2f}, {y['iou']:.2f})")
    return "\n".join(lines)


def samples_of(rows):
    """What tells samples apart; without the images' folder, which each may have spelled in its own way."""
    return [(row["image"].replace("\\", "/").rpartition("/")[2], row["expression"], row["target"]) for row in rows]


def rows_of(path):
    """The rows of a per-sample file. Raises ValueError."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                numbers = [*([0] * 4 if row["target"] is None else row["target"]), row["iou"]]  # None: true of nothing
                # neither bool nor NaN, nor an int that no float can hold
                if len(numbers) != 5 or not all(type(v) in (int, float) and abs(v) < 1e9 for v in numbers):
                    raise ValueError
                if not isinstance(row["image"], str) or not isinstance(row["expression"], str):
                    raise ValueError
                rows.append(row)
    except OSError as error:
        raise ValueError(f"{shown(path)}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        where = f", line {len(rows) + 1}" if rows else ""
        raise ValueError(f"{shown(path)}{where}: not a file of --per_sample; give one that it wrote") from None
    return rows
