"""The runs of the ablation: train.py on every arm, and a line of results for each run in a file."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import train
from hivg import weights
from hivg.ablate.arms import ARMS, BY_NAME, patched
from hivg.boxes import box_on_grid
from hivg.data.batches import ShapesTensors, evaluation_batches, to_device
from hivg.evaluate import predict
from hivg.metrics import accuracy, mean
from hivg.training.flags import RUNS
from hivg.utils.cli import choose_device, choose_dtype

RESULTS = Path("notebooks/ablations.jsonl")
FOLDER = "ablate"  # of the runs, under runs/
SPLITS = ("test", "compose")
PICTURED = 8  # expressions of `test`, two images, whose attention is kept
LEADING = 448  # expressions of `test` for what is not measured on all; batches of 64 and of 4 divide it


@dataclass(frozen=True)
class Budget:
    """How long every arm is trained, and how its learning rate is chosen."""

    epoch_samples: int
    epochs: tuple
    lrs: tuple  # the grid: each is tried on the first seed, the best on `val` is taken for the others
    arms: tuple  # names; empty: all


BUDGETS = {
    # 12,288 expressions, a tenth of the default run's
    "short": Budget(2048, (1, 1, 1, 3), (2e-3, 4e-3), ()),
    # the default run's
    "long": Budget(8192, (1, 1, 1, 12), (3e-3,), ("base", "bridge none", "bridge constant", "lora vanilla",
                                                   "lora none")),
}
FIVE_SEEDS = ("base", "bridge none", "bridge constant", "lora shared", "lora vanilla", "lora none")


# ---- one run

def settings_of(arm, budget, lr, seed):
    """train.py's settings for a run."""
    b = BUDGETS[budget]
    name = f"{FOLDER}/{budget}, {arm.name}, {lr:g}, {seed}".replace(" ", "_").replace(",", "")
    return train.Settings(name=name, resume=(RUNS / name / "state.pt").exists(), seed=seed, workers=0,
                          epoch_samples=b.epoch_samples, epochs=b.epochs, lr=(lr,) * len(b.epochs), warmup_steps=20,
                          **arm.settings)


def run(arm, budget, lr, seed, results_file=RESULTS):
    """Train and evaluate an arm, and append the row of its results to the file."""
    start = time.monotonic()
    settings = settings_of(arm, budget, lr, seed)
    with patched(arm, settings):
        path = train.train(settings)
        row = {"arm": arm.name, "budget": budget, "lr": lr, "seed": seed, **arm.definition()}
        row |= {"expressions": sum(stage.epochs for stage in train.stages(settings)) * settings.epoch_samples}
        row |= results(settings, path)
    row["minutes"] = None if settings.resume else round((time.monotonic() - start) / 60, 2)
    row["version"] = code_version()
    with open(results_file, "a") as file:
        file.write(json.dumps(row) + "\n")
    shutil.rmtree(path.parent)


def results(settings, path):
    """All that is kept of a trained run. path: of its last stage's weights."""
    device = choose_device("auto")
    row = {"parameters": {}, "val": {}, "attention": {}}
    for stage in train.stages(settings):
        model = weights.load_hivg(path.with_name(f"{stage.name}.safetensors"))
        row["val"][stage.name] = round(model.info["accuracy"], 4)
        row["attention"][stage.name] = attention(model, device)
        row["parameters"][stage.name] = sum(p.numel() for p in model.parameters())
    model = model.for_prediction(device, choose_dtype("auto", device))
    for split in SPLITS:
        row[split] = scores(predict(model, batches_of(model, split), device))
    row["batch_dependence"] = batch_dependence(model, device)
    return row


def batches_of(model, split, batch_size=64):
    config = model.config
    return evaluation_batches(ShapesTensors(split, config.clip.image_size, config.normalization), batch_size)


def scores(rows):
    """Of the rows of `predict`: accuracy, mean IoU, and for each expression whether it is right."""
    ious = [row["iou"] for row in rows]
    right = [iou >= 0.5 for iou in ious]
    return {"accuracy": accuracy(ious), "mean_iou": round(mean(ious), 4), "right": pack(right)}


def first_batches(model, batch_size):
    """Batches of the first LEADING expressions of `test`."""
    return islice(batches_of(model, "test", batch_size), LEADING // batch_size)


def batch_dependence(model, device):
    """How far a prediction depends on its batch: the first expressions of `test` in batches of 64 and of 4 -> the mean
    of the largest move of a box's sides in pixels, and the share of the answers that are right in one alone."""
    a = predict(model, first_batches(model, 64), device)
    b = predict(model, first_batches(model, 4), device)
    moved = []
    changed = []
    for x, y in zip(a, b):
        moved.append(max(abs(p - q) for p, q in zip(x["box"], y["box"])))
        changed.append((x["iou"] >= 0.5) != (y["iou"] >= 0.5))
    return {"moved_pixels": round(mean(moved), 4), "answers_changed": mean(changed)}


@torch.no_grad()
def attention(model, device):
    """Where [REG] looks in the last encoder layer, mean of its heads, over the first expressions of `test` -> {"maps":
    of PICTURED expressions, (PICTURED, P) bytes in base64, each scaled to its largest; "on_target": the share of the
    attention on patches that is on those of the box wanted, mean of all}."""
    model = model.to(device).eval()
    maps = []
    on_target = []
    for batch in first_batches(model, 64):
        batch = to_device(batch, model.tokenizer, device)
        output = model(batch["images"], batch["padding_mask"], batch["token_ids"], with_hints=True)
        shares = output.reg_attention[-1].exp().mean(1)  # (B, P)
        shares = shares / shares.sum(1, keepdim=True)
        wanted = box_on_grid(batch["boxes"], (model.side, model.side), model.config.clip.image_size)  # (B, P)
        on_target += (shares * wanted).sum(1).tolist()
        maps.append(255 * shares / shares.amax(1, keepdim=True))
    maps = torch.cat(maps)[:PICTURED].round().byte().cpu().numpy()
    return {"maps": base64.b64encode(maps.tobytes()).decode(), "on_target": round(mean(on_target), 4)}


def pack(flags):
    """Booleans, eight to a byte, in base64."""
    return base64.b64encode(np.packbits(flags).tobytes()).decode()


def unpack(text, n):
    """-> (n,) bool."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:n].astype(bool)


def code_version():
    """The commit, with a + if files differ from it; "unknown" without git."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True)
        return found.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


# ---- all runs

def key(row):
    return row["budget"], row["arm"], row["lr"], row["seed"]


def read_results(path=RESULTS):
    """The rows of the results file, {key: row}; of an arm defined differently today they are left out."""
    rows = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        row = json.loads(line)
        arm = BY_NAME.get(row["arm"])
        now = json.loads(json.dumps(arm.definition())) if arm else None
        if now == {name: row[name] for name in ("settings", "config", "trick")}:
            rows[key(row)] = row
    return rows


def best_lr(rows, budget, arm, seed):
    """The learning rate of the grid with which the arm did best on `val` with the first seed; None before all are
    tried."""
    found = []
    for lr in BUDGETS[budget].lrs:
        row = rows.get((budget, arm, lr, seed))
        if row is None:
            return None
        found.append((list(row["val"].values())[-1], lr))
    return max(found)[1]


def missing(rows, budget, names, seeds):
    """Keys of the runs that can be started now: on the first seed all rates, on the others the best."""
    keys = []
    for seed in seeds:
        for name in names:
            if seed == seeds[0]:
                lrs = BUDGETS[budget].lrs
            else:
                lrs = [best_lr(rows, budget, name, seeds[0])]
            keys += [(budget, name, lr, seed) for lr in lrs if lr and (budget, name, lr, seed) not in rows]
    return keys


def run_missing(budget, names, seeds, jobs):
    """Run what is missing, `jobs` at once, in a process each."""
    names = names or BUDGETS[budget].arms or [arm.name for arm in ARMS]
    for phase in (seeds[:1], seeds):  # the rates are chosen on the first seed
        keys = missing(read_results(), budget, names, phase)
        start = time.monotonic()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                runs = [pool.submit(run_in_process, key) for key in keys]
                for done, finished in enumerate(as_completed(runs), start=1):
                    left = (time.monotonic() - start) / done * (len(keys) - done) / 60
                    print(f"{done} of {len(keys)}: {finished.result()}; {left:.0f} min left, at this rate, of "
                          f"{'the choice of rates' if phase == seeds[:1] else 'the other seeds'}", file=sys.stderr)
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise


def run_in_process(key):
    """One run in a process of its own, with one thread; its output goes to a log -> a line on how it ended."""
    log = RUNS / FOLDER / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    budget, arm, lr, seed = key
    command = [sys.executable, "-m", "hivg.ablate", "one", arm, "--budget", budget, "--lr", str(lr)]
    with open(log, "a") as file:
        done = subprocess.run([*command, "--seed", str(seed)], stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    row = read_results().get(key)
    if done.returncode or row is None:
        return f"{arm}, rate {lr:g}, seed {seed} FAILED, see {log}; start again to try it again"
    return f"{arm}, rate {lr:g}, seed {seed}: {row['test']['accuracy']:.3f} of test"
