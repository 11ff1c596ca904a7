"""What a training step launches on a GPU that need not be there: python -m hivg.bench launches --preset refcocog-base

Without a preset, the step of `python train.py`. The last stage's step runs on fake tensors, which have shapes but no
numbers. Attention, dropout, the fusion and the clipping are a GPU's operators; the others are the same as a CPU's.
The count is for comparing: an H200's profiler saw 5,583 launches where such a count, of an older state, said 4,868.

A part is the class or file of the innermost function of this project that runs; an operator of the backward belongs to
the part that made its node of the graph. "step" is all that follows the backward: clipping, update, log.
"""

import re
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hivg import clip, fusion
from hivg.bench.timing import CPU, Report
from hivg.bench.training import clip_name_of, preset_model, random_batch, settings_of
from hivg.fast import training_copy
from hivg.training import distributed
from hivg.training.criterion import Criterion
from hivg.training.log import Log
from hivg.training.optimizers import clip_and_step, make_optimizers

PHASES = ("forward", "backward", "step")
KINDS = {  # {kind: its operators}
    "conversion": "_to_copy|_foreach_copy_",
    "matrix product": "mm|addmm|bmm|baddbmm|convolution.*",
    "attention": "_scaled_dot_product.*",
    "fusion": "fusion.*",
    "layer norm": "native_layer_norm.*",
    "dropout": "native_dropout.*",
    "copy": "cat|stack|clone|copy_|index|embedding|constant_pad_nd|(slice|select)_backward",
    "elementwise, sums, fills": ".*",
}
NO_WORK = "(new_)?empty.*|_unsafe_view"
SEVERAL = {"fusion_backward": 12, "_scaled_dot_product_efficient_attention_backward": 3, "embedding_dense_backward": 8,
           "constant_pad_nd": 2, "slice_backward": 2, "select_backward": 2}  # {operator: its launches}; others: one


def launches_of(name, args, out):
    if name.startswith(("_foreach", "_fused")):  # a launch takes up to 48 tensors, and 320 blocks of 65,536 numbers
        tensors = args[0]
        blocks = sum(-(-t.numel() // 65536) for t in tensors)
        return max(-(-len(tensors) // 48), -(-blocks // 320))
    if name == "native_layer_norm_backward":
        return 1 if out[1] is None else 2  # the gradients of weight and bias take another
    return SEVERAL.get(name, 1)


def attend(q, k, v, mask, causal, dropout):
    """clip.attend as one operator. A GPU makes numbers of the mask, in rows of a multiple of 16, in every call."""
    if mask is not None:
        mask = torch.where(mask, torch.zeros((), dtype=q.dtype), torch.full((), float("-inf"), dtype=q.dtype))
        if mask.shape[-1] % 16:
            mask = F.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]
        mask = mask.expand(*q.shape[:3], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout, causal)[0]


def dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if p and training else x


@contextmanager
def as_on_a_gpu():
    clipped = partial(torch.nn.utils.clip_grad_norm_, foreach=True)
    stand_ins = {(clip, "attend"): attend, (fusion, "choose_backend"): lambda kind: "triton",
                 (F, "dropout"): dropout, (torch.nn.utils, "clip_grad_norm_"): clipped}
    originals = {place: getattr(*place) for place in stand_ins}
    try:
        for place, function in stand_ins.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in originals.items():
            setattr(*place, function)


class Launches(TorchDispatchMode):
    """Counts while it is on: `counts` {(phase, part, kind): launches}. Set `phase` before each phase."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.ends = []  # for each operator of the forward, the number of the graph's next node ..
        self.parts = []  # .. and the operator's part

    def part(self):
        frame = sys._getframe(2)
        while frame:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("hivg.") and not module.startswith(("hivg.bench", "hivg.utils")):
                owner = frame.f_code.co_qualname.rpartition(".")[0].removesuffix(".<locals>")
                self.ends.append(torch._C._autograd._get_sequence_nr())
                self.parts.append(f"{module.rpartition('.')[2]}.{owner}".rstrip("."))
                return self.parts[-1]
            frame = frame.f_back
        node = torch._C._current_autograd_node()
        made = bisect_right(self.ends, node._sequence_nr()) if node else len(self.ends)
        return self.parts[made] if made < len(self.ends) else "gradients summed"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        schema = function._schema
        name = schema.name.partition("::")[2]
        makes = any("Tensor" in str(r.type) and not r.alias_info for r in schema.returns)  # a view is an alias
        part = self.part()
        if (makes or schema.is_mutable) and not re.fullmatch(NO_WORK, name):
            kind = next(kind for kind, names in KINDS.items() if re.fullmatch(names, name))
            self.counts[self.phase, part, kind] += launches_of(name, args, out)
        return out


def count(preset, batch_size):
    """-> {(phase, part, kind): launches} of a step. preset: a row of training/presets.py, or None, the default run."""
    settings = settings_of(preset)
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu(), tempfile.TemporaryDirectory() as folder:
        model = preset_model(preset, clip_name_of(preset))
        criterion = Criterion(training_copy(model, torch.bfloat16), settings["loss_weights"], settings["box_loss"])
        optimizers = make_optimizers(model, settings["optimizer"], 1e-4)
        batch = random_batch(batch_size, model.config.clip, CPU)
        log = Log(Path(folder))
        for _ in range(2):  # the first also makes the state of optimizers and log
            with Launches() as launches:
                launches.phase = "forward"
                with torch.autocast("cpu", torch.bfloat16):
                    terms = criterion(batch)
                loss = sum(terms.values())
                launches.phase = "backward"
                loss.backward()
                launches.phase = "step"
                values = distributed.mean([{"loss": loss.detach(), **terms}])
                norm = clip_and_step(model, optimizers, settings["clip_grad"])
                log.step("", 1, 9, 0.0, values | {"gradient_norm": norm})
    return launches.counts


def bench_launches(args):
    """Two tables, by part and by kind. Needs Triton for the fusion's operators, but no GPU."""
    batch_size = args.batch_size or settings_of(args.preset)["batch_size"]
    counts = count(args.preset, batch_size)
    report = Report()
    report.say(f"{args.preset or 'python train.py'}, batch {batch_size}: {counts.total():,} launches")
    for column, title in ((1, "part"), (2, "kind")):
        totals = Counter()
        for key, n in counts.items():
            totals[key[column]] += n
        report.header(title, *PHASES, "all")
        for name, total in totals.most_common():
            row = [sum(n for key, n in counts.items() if (key[0], key[column]) == (phase, name)) for phase in PHASES]
            report.row(name, *row, total)
