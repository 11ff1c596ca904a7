"""A training step as one CUDA graph: its launches are recorded once and then sent together, one call for thousands.

Without it a GPU that finishes a small launch in microseconds waits for the program to make the next. A recording needs

- the same memory every time: each batch is copied into tensors that stay, and gradients are cleared inside the step;
- the same shapes: texts are padded to a multiple of 8 positions, and each length is recorded on its own;
- no Python number that changes from step to step: the learning rate is a tensor on the device;
- that Python reads no result until the step is over: the loss and the gradient's norm are checked after it.
"""

from collections import Counter

import torch

from hivg.utils.memory import is_out_of_memory
from hivg.utils.messages import shown

RECORDED = {"images", "padding_mask", "boxes", "masks", "image_ids", "present"}  # of a batch, beside token_ids
WARM_UP = 3  # steps of a length before it is recorded, launch by launch: kernels are chosen and compiled in them


class GraphedStep:
    """Takes a training step, on a GPU by its recording, elsewhere by a call."""

    def __init__(self, step, optimizers, context_length, device):
        """step: a function of a list of batches that returns {name: scalar tensor} and leaves no gradients. optimizers:
        its own, with their state restored. context_length: the most positions of a text. device: where all of it is."""
        self.step = step
        self.context_length = context_length
        self.batches = None  # of the step, in memory that stays, with texts of the full length
        self.taken = Counter()  # {length of the texts: steps before its recording}
        self.replays = {}  # {length: a function without arguments that takes the step on self.batches}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = None  # the memory of all recordings, of which only one runs at a time
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self.groups:
            group["lr"] = torch.zeros((), device=device)  # filled by set_learning_rate

    def __call__(self, parts):
        """parts: a step's batches, as to_device returns them -> what the step returns; the next call overwrites it."""
        T = self.load(list(parts))
        batches = [batch | {"token_ids": batch["token_ids"][:, :T]} for batch in self.batches]
        if T not in self.replays and self.taken[T] == WARM_UP:
            self.replays[T] = self.record(batches)
        if T in self.replays:
            return self.replays[T]()
        self.taken[T] += 1
        return self.alone(batches)

    def load(self, parts):
        """Copy the step's batches into self.batches -> the length of its texts, in all of its parts the same."""
        if self.batches is None:
            self.batches = []
            for part in parts:
                ids = part["token_ids"].new_zeros(len(part["token_ids"]), self.context_length)
                copies = {name: torch.empty_like(part[name]) for name in RECORDED & part.keys()}
                self.batches.append(copies | {"token_ids": ids})
        for batch, part in zip(self.batches, parts, strict=True):
            for name in RECORDED & part.keys():
                batch[name].copy_(part[name])
            batch["token_ids"].zero_()  # padding: nothing looks past the end token
            batch["token_ids"][:, : part["token_ids"].shape[1]].copy_(part["token_ids"])
        longest = max(part["token_ids"].shape[1] for part in parts)
        return min(-(-longest // 8) * 8, self.context_length)

    def alone(self, batches):
        """A step without recording, on the stream that records, to which autograd then keeps."""
        if self.stream is None:
            return self.step(batches)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.step(batches)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def record(self, batches):
        """-> a function that takes the step on what these batches hold when it is called. Recording takes none."""
        if self.stream is None:
            return lambda: self.step(batches)
        for group in self.groups:
            group["capturable"] = True  # PyTorch's optimizers must be told, and warn of steps outside of a recording
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins the next batches' memory may go on meanwhile
        try:
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                results = self.step(batches)
        except RuntimeError as error:
            cause = error.__context__ or error  # leaving a recording that failed raises once more
            if is_out_of_memory(cause):
                raise cause from None
            reason = shown(str(cause).strip().partition("\n")[0], 120)
            raise ValueError(f"--graph: this step cannot be recorded ({reason}); the same command with --resume "
                             "--no_graph goes on") from None
        for group in self.groups:
            group["capturable"] = False
        self.pool = graph.pool()

        def replay():
            graph.replay()
            return results

        return replay
