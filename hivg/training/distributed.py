"""Data parallelism: the few calls that the training needs, each a plain identity when there is one process.

Started by torchrun, every process (rank) takes its share of each batch. Gradients are averaged by
DistributedDataParallel; the contrastive loss sees the features of all ranks.
"""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def start(device):
    """Join the other processes if torchrun started this one -> the device of this one."""
    is_alone = "RANK" not in os.environ
    if device.type == "cuda" and not is_alone:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose random numbers a checkpoint keeps
    if is_alone:
        return device
    # DDP imports this, and its functions' defaults are the group there is: imported later it keeps that beyond `stop`
    from torch.distributed.nn import functional  # noqa: F401
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop():
    """Leave the other processes, when all work is done and what `wrap` returned is gone.

    This ends the threads of gloo. One that still lets go of a tensor while Python ends aborts the process, after all of
    its work: one run in fourteen, on a busy machine.
    """
    if has_started():
        dist.destroy_process_group()


def has_started():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if has_started() else 0


def world():
    return dist.get_world_size() if has_started() else 1


def place():
    """-> rank, world: the number of this process, and how many there are."""
    return rank(), world()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # every rank's loss depends on this rank's x
        return gradient.chunk(world())[rank()]


def gather(x):
    """(B, ..) on every rank -> (world * B, ..), in the order of the ranks. Gradients flow back to every rank; every
    rank must have the same B."""
    return _Gather.apply(x) if world() > 1 else x


def gather_rows(rows):
    """The lists of all ranks, joined in the order of the ranks."""
    if world() == 1:
        return rows
    lists = [None] * world()
    dist.all_gather_object(lists, rows)
    return sum(lists, [])


def mean_of(parts):
    """Dicts {name: scalar tensor} of the parts of a step -> one such dict, averaged over the parts and the ranks."""
    names = list(parts[0])
    rows = []
    for part in parts:
        rows.append(torch.stack([part[name].detach().float() for name in names]))
    values = torch.stack(rows).mean(0)  # (names,)
    if world() > 1:
        dist.all_reduce(values)
        values = values / world()
    return dict(zip(names, values))


def seed_rank():
    """Give each rank its own random numbers, e.g. for dropout; the first keeps those it has."""
    if rank():
        torch.manual_seed(torch.initial_seed() + rank())


def any_rank(flag, device):
    """True on every rank if `flag` is true on one, so that all save at the same step."""
    if world() == 1:
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def wait():
    if world() > 1:
        dist.barrier()


def wrap(module, find_unused=False):
    """The module as it is with one process; with several, wrapped so that their gradients are averaged."""
    return DistributedDataParallel(module, find_unused_parameters=find_unused) if world() > 1 else module


def averaged(module, is_last):
    """The context of a forward of `wrap`'s module. The gradients of a step's parts add up on each rank; the backward of
    the last part averages them over the ranks."""
    return nullcontext() if is_last or world() == 1 else module.no_sync()
