"""Data parallelism: the few calls that training needs. With one process each of them does nothing.

Started by torchrun, every process (rank) takes its share of each batch. Gradients are averaged by
DistributedDataParallel; the contrastive loss sees the features of all ranks.
"""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def init(device):
    """Join the other processes if torchrun started this one -> the device of this one. Raises ValueError if there are
    more of them than GPUs."""
    is_alone = "RANK" not in os.environ
    if device.type == "cuda" and not is_alone:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"torchrun starts more processes than the {torch.cuda.device_count()} GPUs here; give it "
                             f"--nproc_per_node={torch.cuda.device_count()}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose random numbers a checkpoint keeps
    if is_alone:
        return device
    # imported before there is a process group, as its functions keep the one they find, also beyond `destroy`
    from torch.distributed.nn import functional  # noqa: F401
    if not dist.is_initialized():
        is_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if is_gpu else "gloo", device_id=device if is_gpu else None)
    return device


def destroy():
    """Leave the other processes, once all work is done and what `wrap` returned is gone.

    This ends gloo's threads. One that still frees a tensor while Python exits aborts the process after all its work:
    one run in fourteen on a busy machine.
    """
    if is_initialized():
        dist.destroy_process_group()


def is_initialized():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if is_initialized() else 0


def world_size():
    return dist.get_world_size() if is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # every rank's loss depends on this rank's x
        return gradient.chunk(world_size())[rank()]


def gather(x):
    """(B, ..) on every rank -> (world_size * B, ..), in the order of the ranks. Gradients flow back to every rank. All
    ranks must have the same B."""
    return _Gather.apply(x) if world_size() > 1 else x


def gather_rows(rows):
    """The lists of all ranks, joined in the order of the ranks."""
    if world_size() == 1:
        return rows
    lists = [None] * world_size()
    dist.all_gather_object(lists, rows)
    return sum(lists, [])


def mean(parts):
    """Dicts {name: scalar tensor} of the parts of a step -> one such dict, averaged over the parts and the ranks."""
    names = list(parts[0])
    rows = [torch.stack([part[name].detach().float() for name in names]) for part in parts]
    values = torch.stack(rows).mean(0)  # (names,)
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return dict(zip(names, values))


def seed_rank():
    """Give each rank its own random numbers, e.g. for dropout; the first keeps those it has."""
    if rank():
        torch.manual_seed(torch.initial_seed() + rank())


def any_rank(flag, device):
    """True on every rank if `flag` is true on one, so that all save at the same step."""
    if world_size() == 1:
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def barrier():
    if world_size() > 1:
        dist.barrier()


def wrap(module, find_unused=False):
    """The module as it is with one process; with several, wrapped so that their gradients are averaged."""
    return DistributedDataParallel(module, find_unused_parameters=find_unused) if world_size() > 1 else module


def no_sync(module, is_last):
    """The context for the forward of one part of a step. The gradients of the parts add up on each rank; only the
    backward of the last part averages them over the ranks."""
    return nullcontext() if is_last or world_size() == 1 else module.no_sync()
