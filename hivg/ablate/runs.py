"""The runs of the ablation: train.py on every arm, and a line of results for each run in a file."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import train
from hivg import weights
from hivg.ablate.arms import BY_NAME
from hivg.boxes import box_on_grid
from hivg.data.batches import evaluation_batches, open_dataset, to_device
from hivg.data.drawn.scenes import EXPRESSIONS_PER_SCENE
from hivg.evaluate.metrics import accuracy, mean
from hivg.evaluate.predict import predict
from hivg.training.checkpoint import load_state
from hivg.training.optimizers import Diverged
from hivg.training.settings import RUNS
from hivg.utils.cli import choose_device, choose_dtype
from hivg.utils.files import written

RESULTS = Path("notebooks/ablations.jsonl")
FOLDER = "ablate"  # below runs/
SPLITS = ("test", "compose")
MAPS_KEPT = 8  # expressions of `test` (two images) whose attention maps are kept
LEADING = 448  # expressions of `test` for what is not measured on all of it; a multiple of 64 and of 4


@dataclass(frozen=True)
class Budget:
    """How long every arm is trained, and how its learning rate is chosen."""

    epoch_samples: int
    epochs: tuple
    lrs: tuple  # the grid of learning rates, ascending (`next_lr`)
    arms: tuple  # names; empty: all
    seeds: int  # at most

    @property
    def expressions(self):
        return sum(self.epochs) * self.epoch_samples


BUDGETS = {
    # 12,288 expressions
    "short": Budget(2048, (1, 1, 1, 3), (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), (), 5),
    # 122,880
    "long": Budget(8192, (1, 1, 1, 12), (5e-4, 1e-3, 2e-3, 4e-3),
                   ("base", "bridge none", "bridge constant", "lora vanilla", "lora none", "neither", "recipe",
                    "recipe, bridge none", "recipe, bridge constant", "recipe, text norm"), 5),
    # 49,152: across the large gap a short one learns next to nothing
    "gap": Budget(8192, (1, 1, 1, 3), (2e-3, 4e-3), tuple(name for name in BY_NAME if name.endswith("large gap")), 5),
}
FAILED = "FAILED:"
CHOICE_SEED = 0  # the seed on which the rates are chosen


# ---- one run

def settings_of(arm, budget, lr, seed):
    """train.py's settings for a run."""
    b = BUDGETS[budget]
    definition = zlib.crc32(json.dumps(arm.definition()).encode())  # a run of another definition is not resumed
    name = f"{FOLDER}/{budget}, {arm.name}, {lr:g}, {seed}, {definition:08x}".replace(" ", "_").replace(",", "")
    world = dict(dataset="shapes", clip="weights/clip-shapes.safetensors")
    return train.Settings(name=name, seed=seed, workers=0, epoch_samples=b.epoch_samples, epochs=b.epochs,
                          lr=(lr,) * len(b.epochs), warmup_steps=20, **(world | arm.settings))


def can_resume(settings):
    """Whether the run's folder holds a state of exactly these settings; any other state is removed."""
    folder = RUNS / settings.name
    if not (folder / "state.pt").exists():
        return False
    if load_state(folder)["settings"] | {"resume": False} == asdict(settings):  # it may have been resumed before
        return True
    shutil.rmtree(folder)
    return False


def run_one(arm, budget, lr, seed):
    """Train and evaluate an arm, and append the row of its results to RESULTS."""
    start = time.monotonic()
    settings = settings_of(arm, budget, lr, seed)
    resume = can_resume(settings)
    row = {"arm": arm.name, "budget": budget, "lr": lr, "seed": seed, **arm.definition(), "version": code_version()}
    row["expressions"] = sum(stage.epochs for stage in train.stages(settings)) * settings.epoch_samples
    hooks = train.Hooks(arm.config, arm.prepare, one_stream=True)  # every arm sees the same data in the same order
    try:
        row |= results(arm, settings, train.train(replace(settings, resume=resume), hooks))
    except Diverged as error:
        row |= {"diverged": str(error), "val": {"diverged": 0.0}}  # so that another rate is chosen
    row["minutes"] = None if resume else round((time.monotonic() - start) / 60, 2)
    append(RESULTS, row)
    shutil.rmtree(RUNS / settings.name)


def append(path, row):
    """Append a row to the file in one write, on a line of its own even if a killed process left half a line."""
    is_cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with written(path), open(path, "a") as file:
        file.write("\n" * is_cut + json.dumps(row) + "\n")


def results(arm, settings, path):
    """What is kept of a trained run. path: its last stage's weights."""
    device = choose_device("auto")
    row = {"parameters": {}, "val": {}, "attention": {}}
    for stage in train.stages(settings):
        model = weights.load_hivg(path.with_name(f"{stage.name}.safetensors"))
        arm.prepare(model)
        row["val"][stage.name] = round(model.info["accuracy"], 4)
        row["attention"][stage.name] = attention(model, device)
        row["parameters"][stage.name] = sum(p.numel() for p in model.parameters())
    row["copying"] = copying(model, device)
    model = model.for_prediction(device, choose_dtype("auto", device))
    predicted = {split: predict(model, batches_of(model, split), device) for split in SPLITS}
    row |= {split: scores(rows) for split, rows in predicted.items()}
    row["batch_dependence"] = batch_dependence(predicted["test"][:LEADING], model, device)
    return row


def batches_of(model, split, batch_size=64):
    config = model.config
    dataset = open_dataset(model.info["dataset"], split, config.clip.image_size, config.normalization)
    return evaluation_batches(dataset, batch_size)


def scores(rows):
    """Accuracy and mean IoU of the expressions that are true of something, and whether each expression is right, of the
    rows of `predict`."""
    ious = [row["iou"] for row in rows if row["target"]]
    right = [row["iou"] >= 0.5 for row in rows]
    return {"accuracy": accuracy(ious), "mean_iou": round(mean(ious), 4), "right": pack(right)}


def first_batches(model, batch_size):
    """Batches of the first LEADING expressions of `test`."""
    return islice(batches_of(model, "test", batch_size), LEADING // batch_size)


def batch_dependence(rows, model, device):
    """How far a prediction depends on its batch: rows, of the first expressions of `test` in batches of 64, against
    batches of 4 -> the mean of the largest move of a box's sides in pixels, and the share of the answers that are right
    in one alone."""
    moved = []
    changed = []
    for x, y in zip(rows, predict(model, first_batches(model, 4), device)):
        moved.append(max(abs(p - q) for p, q in zip(x["box"], y["box"])))
        changed.append((x["iou"] >= 0.5) != (y["iou"] >= 0.5))
    return {"moved_pixels": round(mean(moved), 4), "answers_changed": mean(changed)}


@torch.no_grad()
def copying(model, device, n=64):
    """Does an image's feature repeat the text that the bridge has told it? n images of `val`, each with the text of
    another -> the share of texts that are nearest to the image they were "shown" with, and, where each image has its
    own text, to that one ("own"). Chance is 1/n for both."""
    model = model.to(device).eval()
    rows = EXPRESSIONS_PER_SCENE
    batch = to_device(next(iter(batches_of(model, "val", rows * n))), model.tokenizer, device)
    images, padding_mask, token_ids = (batch[key][::rows] for key in ("images", "padding_mask", "token_ids"))
    found = {}
    for name, shift in (("own", 0), ("shown", 1)):
        output = model(images, padding_mask, token_ids.roll(shift, 0))
        nearest = output.logits_per_text.argmax(1)  # (n,): the image that each text is nearest to
        found[name] = mean((nearest == torch.arange(len(nearest), device=device)).tolist())
    return found


@torch.no_grad()
def attention(model, device):
    """Where [REG] looks in the last encoder layer, mean of its heads, over the first expressions of `test` -> {"maps":
    of MAPS_KEPT expressions, (MAPS_KEPT, P) bytes in base64, each scaled to its largest; "on_target": the share of the
    attention on patches that is on those of the box wanted, mean of all}."""
    model = model.to(device).eval()
    maps = []
    on_target = []
    for batch in first_batches(model, 64):
        batch = to_device(batch, model.tokenizer, device)
        output = model(batch["images"], batch["padding_mask"], batch["token_ids"], with_reg_attention=True)
        shares = output.reg_attention[-1].exp().mean(1)  # (B, P)
        shares = shares / shares.sum(1, keepdim=True)
        wanted = box_on_grid(batch["boxes"], (model.side, model.side), model.config.clip.image_size)  # (B, P)
        on_target += (shares * wanted).sum(1)[batch["present"]].tolist()  # nothing is wanted by the others
        maps.append(255 * shares / shares.amax(1, keepdim=True))
    maps = torch.cat(maps)[:MAPS_KEPT].round().byte().cpu().numpy()
    return {"maps": base64.b64encode(maps.tobytes()).decode(), "on_target": round(mean(on_target), 4)}


def pack(flags):
    """Booleans, eight to a byte, in base64."""
    return base64.b64encode(np.packbits(flags).tobytes()).decode()


def unpack(text, n):
    """-> (n,) bool."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:n].astype(bool)


def code_version():
    """The commit, with a + if files other than the results differ from it; "unknown" without git."""
    try:
        found = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True)
        same = ["git", "diff", "--quiet", "HEAD", "--", ".", f":(exclude){RESULTS}"]
        changed = subprocess.run(same, capture_output=True).returncode != 0
    except OSError:
        return "unknown"
    return found.stdout.strip() + "+" * changed if found.stdout else "unknown"


# ---- all runs

def read_results(path=RESULTS):
    """The rows of the results file, {(budget, arm, rate, seed): row}. Left out are rows of arms and budgets that are
    defined differently today, and lines that a killed process has cut. Rows of older code count: whoever changes what
    an arm computes renames it, or removes its rows."""
    rows = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if is_of_today(row):
            rows[row["budget"], row["arm"], row["lr"], row["seed"]] = row
    return rows


def is_of_today(row):
    arm = BY_NAME.get(row["arm"])
    budget = BUDGETS.get(row["budget"])
    if arm is None or budget is None or row["expressions"] != budget.expressions:
        return False
    now = json.loads(json.dumps(arm.definition()))  # lists for tuples
    if weights_then := row["settings"].get("loss_weights"):  # a loss that is newer than the row was not in it
        newer = now["settings"].get("loss_weights", {}).keys() - weights_then.keys()
        row = row | {"settings": row["settings"] | {"loss_weights": weights_then | dict.fromkeys(newer, 0.0)}}
    return now == {name: row[name] for name in now}


def accuracies(rows, budget, arm):
    """{learning rate: accuracy on `val` at the end} of the runs from which the rate is chosen."""
    return {lr: list(row["val"].values())[-1] for lr in BUDGETS[budget].lrs
            if (row := rows.get((budget, arm, lr, CHOICE_SEED)))}


def next_lr(found, lrs):
    """The rate of the grid to try next, given {rate: accuracy}; None where the best is known. From the middle of the
    grid outwards, until both neighbours of the best are tried: if there is one peak, that is it."""
    middle = lrs[(len(lrs) - 1) // 2 : len(lrs) // 2 + 1]
    for lr in middle:
        if lr not in found:
            return lr
    best = lrs.index(max(found, key=found.get))
    return next((lr for lr in lrs[max(0, best - 1) : best + 2] if lr not in found), None)


def best_lr(rows, budget, arm):
    """The learning rate chosen for an arm, or None if that needs more runs."""
    found = accuracies(rows, budget, arm)
    if next_lr(found, BUDGETS[budget].lrs):
        return None
    return max(found, key=found.get)


def missing(rows, budget, names, seeds=None):
    """Keys of the runs that can be started now: of an arm whose rate is not chosen, the next one to try. Without seeds,
    each arm has its own."""
    keys = []
    for seed in seeds or range(BUDGETS[budget].seeds):
        for name in names:
            if seeds is None and seed >= BY_NAME[name].seeds:
                continue
            lr = best_lr(rows, budget, name)
            wanted = (budget, name, lr, seed)
            if lr is None:
                wanted = (budget, name, next_lr(accuracies(rows, budget, name), BUDGETS[budget].lrs), CHOICE_SEED)
            if wanted not in rows and wanted not in keys:
                keys.append(wanted)
    return keys


def run_missing(budget, names, seeds, jobs):
    """Run what is missing of these arms, `jobs` at once, in a process each -> how many failed. seeds: as `missing`."""
    failed = set()
    while keys := [key for key in missing(read_results(), budget, names, seeds) if key not in failed]:
        start = time.monotonic()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                runs = {pool.submit(run_in_process, key): key for key in keys}
                for done, finished in enumerate(as_completed(runs), start=1):
                    text = finished.result()
                    if text.startswith(FAILED):
                        failed.add(runs[finished])
                    left = (time.monotonic() - start) / done * (len(keys) - done) / 60
                    print(f"{done} of {len(keys)}: {text}; {left:.0f} min left of these", file=sys.stderr)
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
    return len(failed)


def run_in_process(key):
    """One run in a process of its own, with one thread; its output goes to a log -> a line on how it ended."""
    log = RUNS / FOLDER / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    budget, arm, lr, seed = key
    command = [sys.executable, "-m", "hivg.ablate", "one", arm, "--budget", budget, "--lr", str(lr)]
    with open(log, "a") as file:
        done = subprocess.run([*command, "--seeds", str(seed)], stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    row = read_results().get(key)
    title = f"{arm}, rate {lr:g}, seed {seed}"
    if done.returncode or row is None:
        return f"{FAILED} {title}: {log} says why; start again to try it again"
    if "diverged" in row:
        return f"{title}: diverged"
    return f"{title}: {row['test']['accuracy']:.3f} of test"
