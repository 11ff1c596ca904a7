"""The report of the ablation, tables and charts, from its results file alone."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from hivg.ablate.arms import ARMS, BY_NAME, CLAIMS, COMPARED
from hivg.ablate.charts import plot_attention, plot_differences
from hivg.ablate.runs import BUDGETS, best_lr, read_results, unpack
from hivg.ablate.statistics import differences
from hivg.clip import CLIP_SIZES
from hivg.data.drawn.expressions import KINDS, NOTHING
from hivg.data.drawn.scenes import EXPRESSIONS_PER_SCENE, Shapes
from hivg.evaluate.metrics import LENGTHS
from hivg.utils.files import save_image


@dataclass(frozen=True)
class Runs:
    """The runs of an arm at its best learning rate."""

    lr: float
    rows: dict  # seed -> row of the results file

    def right(self, seeds, split="test"):
        """(S, n) bool: whether each expression of a split is right, for each of these seeds."""
        n = EXPRESSIONS_PER_SCENE * len(Shapes(split))
        return np.stack([unpack(self.rows[seed][split]["right"], n) for seed in seeds])

    def accuracy(self, split="test"):
        """Mean of the seeds."""
        return float(np.mean([row[split]["accuracy"] for row in self.rows.values()]))


def runs_of(rows, budget):
    """{name of an arm: Runs}, for the arms whose learning rate is chosen."""
    found = {}
    for arm in ARMS:
        lr = best_lr(rows, budget, arm.name)
        of_arm = {seed: row for (*run, seed), row in rows.items()
                  if run == [budget, arm.name, lr] and "diverged" not in row}
        if of_arm:
            found[arm.name] = Runs(lr, of_arm)
    return found


def comparisons(found, split="test"):
    """[(Arm, Difference to the arm it is compared with)] in the order of CLAIMS, for the seeds that both have. The
    arms of a claim share a variance: they are alike, while an arm that barely learns differs much from seed to seed.
    A claim that was tried with one seed alone is left out, as nothing tells its spread."""
    pairs = [(arm, seeds) for arm in COMPARED if (seeds := shared_seeds(found, arm))]
    told = {arm.claim for arm, seeds in pairs if len(seeds) > 1}
    pairs = [(arm, seeds) for arm, seeds in pairs if arm.claim in told]
    results = []
    for claim in [claim for claim in CLAIMS if claim in told]:
        of_claim = [(arm, seeds) for arm, seeds in pairs if arm.claim == claim]
        right = [(found[arm.name].right(seeds, split), found[arm.against].right(seeds, split))
                 for arm, seeds in of_claim]
        is_wide = of_claim[0][0].settings.get("dataset") == "shapes-wide"  # a claim's arms share a world
        counted = share_present(split) if is_wide else 1.0
        for (arm, _), d in zip(of_claim, differences(right, EXPRESSIONS_PER_SCENE, len(pairs), counted)):
            results.append((arm, d))
    return results


@cache
def share_present(split):
    """The share of the expressions of the wider world's split that are true of something."""
    shapes = Shapes(split, wide=True)
    present = [expression.target != NOTHING for i in range(len(shapes)) for expression in shapes.scene(i)[1]]
    return sum(present) / len(present)


def shared_seeds(found, arm):
    """The seeds that an arm and the one it is compared with both have, ascending."""
    if arm.name not in found or arm.against not in found:
        return []
    return sorted(found[arm.name].rows.keys() & found[arm.against].rows.keys())


def gain_in_iou(found, arm):
    """Points of mean IoU on `test` that an arm has more than the one it is compared with, mean of the seeds."""
    seeds = shared_seeds(found, arm)
    return 100 * float(np.mean([found[arm.name].rows[seed]["test"]["mean_iou"]
                                - found[arm.against].rows[seed]["test"]["mean_iou"] for seed in seeds]))


def groups_of_test():
    """{kind or length: (n,) bool, which expressions of `test` are of it}."""
    test = Shapes("test")
    expressions = [expression for index in range(len(test)) for expression in test.scene(index)[1]]
    kinds = np.array([expression.kind for expression in expressions])
    words = np.array([len(expression.text.split()) for expression in expressions])
    groups = {kind: kinds == kind for kind in KINDS}
    for name, (low, high) in LENGTHS.items():
        groups[name] = (low <= words) & (words <= high)
    return groups


# ---- tables

class Table(str):
    """A table in Markdown, which Jupyter shows as a table."""

    __repr__ = str.__str__

    def _repr_markdown_(self):
        return str(self)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return Table("\n".join(lines))


def accuracy_table(found):
    """Every arm: accuracy after each stage on `val`, on `test` and `compose` at the end."""
    rows = []
    for name, runs in found.items():
        row = next(iter(runs.rows.values()))
        parameters = list(row["parameters"].values())[-1]
        stages = []
        for stage in row["val"]:
            stages.append(f"{np.mean([r['val'][stage] for r in runs.rows.values()]):.3f}")
        finals = [r["test"]["accuracy"] for r in runs.rows.values()]
        spread = f"{np.std(finals, ddof=1):.3f}" if len(finals) > 1 else "-"
        on_target = np.mean([list(r["attention"].values())[-1]["on_target"] for r in runs.rows.values()])
        iou = np.mean([r["test"]["mean_iou"] for r in runs.rows.values()])
        rows.append((name, f"{parameters / 1e6:.2f} M", f"{runs.lr:g}", len(runs.rows), ", ".join(stages),
                     f"{runs.accuracy():.3f}", spread, f"{iou:.3f}", f"{runs.accuracy('compose'):.3f}",
                     f"{on_target:.2f}"))
    return table(("arm", "parameters", "rate", "seeds", "`val` after each stage", "`test`", "sd of seeds", "mean IoU",
                  "`compose`", "[REG] on target"), rows)


def claims_table(found, results):
    """Every comparison by claim: points of Acc@0.5 on `test` with their interval, once with the spread of the claim's
    comparisons together, once with its own; points of mean IoU; points on `compose` with their interval. results: of
    `comparisons` on `test`."""
    rows = []
    told = None
    for (arm, d), (_, c) in zip(results, comparisons(found, "compose")):
        claim = CLAIMS[arm.claim] if arm.claim != told else ""
        told = arm.claim
        rows.append((claim, f"{arm.name}: {arm.differs}", arm.against, d.seeds, f"{d.points:+.1f}",
                     f"{d.low:+.1f} to {d.high:+.1f}", f"{d.visible:.1f}", d.verdict,
                     f"{d.own[0]:+.1f} to {d.own[1]:+.1f}, {d.own_verdict}", f"{gain_in_iou(found, arm):+.1f}",
                     f"{c.points:+.1f} ({c.low:+.1f} to {c.high:+.1f})"))
    return table(("claim", "tried", "against", "seeds", "points", "interval", "its half", "the arm is",
                  "with its own spread", "mean IoU", "`compose`"), rows)


def groups_table(found, arms):
    """By kind and length of the expression: Acc@0.5 of the base in percent, and the points of arms against those that
    they are compared with, without intervals."""
    groups = groups_of_test()
    base = 100 * found["base"].right(found["base"].rows).mean(0)  # (n,)
    rows = [("base", "", *(f"{base[of_group].mean():.1f}" for of_group in groups.values()))]
    for arm in arms:
        seeds = shared_seeds(found, arm)
        gain = 100 * (found[arm.name].right(seeds).astype(float) - found[arm.against].right(seeds)).mean(0)  # (n,)
        means = [f"{gain[of_group].mean():+.1f}" for of_group in groups.values()]
        rows.append((arm.name, arm.against, *means))
    return table(("arm", "against", *groups), rows)


def mixing_table(found):
    """How far predictions depend on the batch: the arms that mix, and those they are compared with."""
    names = []
    for arm in ARMS:
        if arm.trick == "mix the batch" and arm.name in found:
            names += [name for name in (arm.against, arm.name) if name in found]
    rows = []
    for name in dict.fromkeys(names):  # once each
        measured = [row["batch_dependence"] for row in found[name].rows.values()]
        moved = np.mean([m["moved_pixels"] for m in measured])
        changed = np.mean([m["answers_changed"] for m in measured])
        rows.append((name, f"{moved:.2f}", f"{100 * changed:.1f} %"))
    return table(("arm", "pixels that a box moves by in another batch", "answers that change"), rows) if rows else ""


def copying_table(found):
    """Whether CLC was met by copying: the arms it was measured for."""
    rows = []
    for name, runs in found.items():
        measured = [row["copying"] for row in runs.rows.values() if "copying" in row]
        if measured:
            own, shown = (np.mean([m[key] for m in measured]) for key in ("own", "shown"))
            rows.append((name, len(measured), f"{own:.2f}", f"{shown:.2f}"))
    return table(("arm", "seeds", "own image found", "image found that another's text was shown with"), rows) if rows \
        else ""


def write_charts(found, results, folder):
    """differences.png and attention.png of a budget, where there is enough for them -> their paths."""
    paths = []
    if results:
        paths.append(folder / "differences.png")
        save_image(plot_differences(results), paths[-1])
    if "base" in found:
        stages = next(iter(found["base"].rows.values()))["attention"]
        columns = {}
        if "bridge none" in found:
            columns["CLIP alone"] = next(iter(found["bridge none"].rows.values()))["attention"]["warmup"]["maps"]
        columns |= {stage: value["maps"] for stage, value in stages.items()}
        paths.append(folder / "attention.png")
        save_image(plot_attention(columns, [0, 1, 4, 5], CLIP_SIZES["tiny"].image_size), paths[-1])
    return paths


def report(path, charts):
    """The whole report in Markdown. path: of the results file. charts: the folder for its charts. Raises ValueError if
    there are no results."""
    rows = read_results(path)
    if not rows:
        raise ValueError(f"{path}: no results; `python -m hivg.ablate run` makes them")
    minutes = sum(row["minutes"] or 0 for row in rows.values())
    versions = sorted({row["version"] for row in rows.values()})
    parts = [f"{len(rows)} runs, {minutes / 60:.1f} hours of one process (without those that were interrupted), code "
             f"{', '.join(versions)}"]
    diverged = [f"{row['arm']} at {row['lr']:g} with seed {row['seed']}" for row in rows.values() if "diverged" in row]
    if diverged:
        parts.append("Diverged: " + "; ".join(diverged) + ".")
    for budget, b in BUDGETS.items():
        found = runs_of(rows, budget)
        if not found:
            continue
        results = comparisons(found)
        absent = [name for name in b.arms or BY_NAME if name not in found]
        parts.append(f"## {budget.capitalize()} budget, {b.expressions:,} expressions")
        if absent:
            parts.append("Not run yet: " + "; ".join(absent) + ".")
        parts += [accuracy_table(found), claims_table(found, results)]
        by_group = [arm for arm, _ in results if arm.claim in ("bridge", "Hi LoRA")]
        if by_group and "base" in found:
            parts.append(groups_table(found, by_group))
        parts += [mixing_table(found), copying_table(found)]
        if paths := write_charts(found, results, charts / budget):
            parts.append("Charts: " + ", ".join(map(str, paths)))
    return "\n\n".join(part for part in parts if part)
