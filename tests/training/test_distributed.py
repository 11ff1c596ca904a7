"""Data parallelism: two processes train as one does, on the same global batch."""

from contextlib import nullcontext

import pytest
import torch
from makers import ROOT, python
from makers_data import write_shapes
from makers_training import assert_same_log, log_of

from hivg.training import distributed

# with AdamW: Muon's products, in bfloat16, would make 1e-5 of the last bit in which the sums of one and two differ
COMMON = ["--name", "run", "--device", "cpu", "--dtype", "float32", "--workers", "0", "--optimizer", "adamw",
          "--warmup_steps", "2"]

# `python MODULE FLAG…` with a small val, of a number that does not divide, and then a look at the threads that are left
PROGRAM = """
import sys
from importlib import import_module
from pathlib import Path
from hivg.data.drawn.scenes import DRAWN

for splits in DRAWN.values():
    splits["val"] = (17, splits["val"][1])
import_module(sys.argv.pop(1)).main()
left = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]  # on Linux, elsewhere nothing
assert not any("gloo" in name for name in left), f"threads that can abort Python at its end: {left}"
"""


def run(folder, processes, module, *flags):
    """Run main() of `module` in `folder`, under torchrun for several processes -> the lines of its log."""
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    start = []
    if processes > 1:
        start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d",
                 "--rdzv_endpoint=localhost:0"]
    done = python(*start, program, module, *flags, cwd=folder,
                  env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # the file's name, once
    return log_of(folder / "runs/run")


@pytest.mark.parametrize("name, chosen", [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_alone_on_a_certain_gpu(monkeypatch, name, chosen):
    """It becomes the current one: a checkpoint keeps the random numbers of that."""
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    assert distributed.init(torch.device(name)) == torch.device(name) and seen == chosen


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="more processes than the 2 GPUs here; give it --nproc_per_node=2"):
        distributed.init(torch.device("cuda"))


def log_of_one_and_two(tmp_path, *args, rel, abs):
    """The log of one process, which is that of two."""
    one, two = (run(tmp_path / str(processes), processes, *args) for processes in (1, 2))
    assert_same_log(one, two, rel, abs)
    return one


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, clip_file):
    """Losses, gradient norms and validation of warm-up and a first LoRA stage, to 1e-5 of their size; the contrastive
    loss among them, which sees the features of both processes."""
    rows = log_of_one_and_two(
        tmp_path, "train", *COMMON, "--clip", clip_file, "--epoch_samples", 48, "--batch_size", 16, "--epochs", 1, 1,
        "--lr", 1e-3, 1e-3, "--lora", "vanilla", "--accumulate", 1, 3, "--loss_weights", "clc=1",  # the paper's CLC
        rel=1e-5, abs=2e-5)
    assert len(rows) == 4 and {"clc", "box", "mask_dice"} <= rows[0].keys()


@pytest.mark.slow
def test_two_processes_train_as_one_on_files(tmp_path, clip_file):
    write_shapes(tmp_path, 4)
    path = write_shapes(tmp_path, 3, split="val", to="val")
    log_of_one_and_two(
        tmp_path, "train", *COMMON, "--clip", clip_file, "--dataset", path, "--epoch_samples", 0, "--batch_size", 8,
        "--lora", "none", "--epochs", 1, "--loss_weights", "clc=1", "patch_box=0", "reg_attention=0",
        rel=1e-5, abs=2e-5)


@pytest.mark.slow
def test_two_processes_pretrain_as_one(tmp_path):
    """The contrasts see the images, captions and phrases of both processes."""
    rows = log_of_one_and_two(
        tmp_path, "hivg.training.pretrain", *COMMON, "--dataset", "shapes", "--epoch_samples", 16,
        "--val_images", 64, "--batch_size", 8, "--epochs", 1, rel=1e-4, abs=1e-4)
    assert len(rows) == 2 and {"clc", "phrases", "expressions"} <= rows[0].keys()


def test_each_rank_draws_numbers_of_its_own(monkeypatch):
    drawn = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(5)
        distributed.seed_rank()
        drawn.append(torch.rand(4).tolist())
    assert len(set(map(tuple, drawn))) == 3
    assert drawn[0] == torch.rand(4, generator=torch.Generator().manual_seed(5)).tolist()


def test_gradients_travel_with_the_last_part_of_a_step_alone(monkeypatch):
    class Module:
        def no_sync(self):
            return "no_sync"

    assert isinstance(distributed.no_sync(Module(), is_last=False), nullcontext)  # one process
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert distributed.no_sync(Module(), is_last=False) == "no_sync"
    assert isinstance(distributed.no_sync(Module(), is_last=True), nullcontext)
