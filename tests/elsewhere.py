"""A device that is not the CPU, for machines without a GPU: its tensors compute the same values, and an operation that
mixes them with CPU tensors raises, as on a GPU. To PyTorch the device is "meta"; each of its tensors holds its values
in a CPU tensor."""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)  # from one device to another


class MixedDevices(RuntimeError):
    pass


class Elsewhere(torch.Tensor):
    """A tensor on the device; `inner` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class ElsewhereMode(TorchDispatchMode):
    """While it is on, `device="meta"` means the device here, for new tensors and for `.to`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    """One operation: checked, computed on the CPU, its result placed on the right device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    # a CPU scalar may take part, as on a GPU
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
    if there and here and function not in MOVES:
        raise MixedDevices(f"{function} of tensors on the device and on the CPU, {[tuple(t.shape) for t in tensors]}")

    if kwargs.get("device") is None:
        is_there = isinstance(args[0], Elsewhere) if function in MOVES else bool(there)
    else:
        is_there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    owners = {id(tensor.inner): tensor for tensor in there}  # an in-place operation returns the tensor it was given
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.inner, (args, kwargs))
    result = function(*args, **kwargs)
    if not is_there:
        return result
    return tree_map_only(torch.Tensor, lambda x: owners[id(x)] if id(x) in owners else Elsewhere(x), result)


def stand_in(monkeypatch):
    """Patch what PyTorch refuses on "meta" and allows on a GPU."""
    autocast = torch.autocast
    adamw = torch.optim.AdamW
    save = torch.save

    def autocast_anywhere(device_type, *args, **kwargs):
        return nullcontext() if device_type == DEVICE.type else autocast(device_type, *args, **kwargs)

    def adamw_anywhere(parameters, fused=None, **kwargs):
        return adamw(parameters, **kwargs)

    def save_anywhere(value, *args, **kwargs):
        save(tree_map_only(Elsewhere, lambda tensor: tensor.inner, value), *args, **kwargs)

    # `module.to(dtype)` makes new parameters: in place, the `inner` of the old ones would keep its dtype
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    for name in ("__enter__", "__exit__"):
        monkeypatch.setattr(torch.inference_mode, name, getattr(torch.no_grad, name))
    monkeypatch.setattr(torch, "autocast", autocast_anywhere)
    monkeypatch.setattr(torch.optim, "AdamW", adamw_anywhere)
    monkeypatch.setattr(torch, "save", save_anywhere)
