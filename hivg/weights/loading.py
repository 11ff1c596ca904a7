"""A weights file -> the model, with exactly its tensors."""

import torch
from torch.overrides import TorchFunctionMode

from hivg.clip import CLIP, CLIPConfig
from hivg.model import HiVG
from hivg.utils.messages import shown
from hivg.weights.reading import KINDS, WeightsError, read, valid_settings


def load(path):
    """Any weights file -> CLIP or HiVG in float32 and evaluation mode, with `tokenizer` (None if no merge table was
    found) and `info`. Raises WeightsError."""
    return build(path, read(path))


def load_clip(path):
    """-> CLIP from OpenAI's, Hugging Face's or our file. Others' heads are taken to be 64 wide, and their activation to
    be QuickGELU, where no config.json of Hugging Face is beside the file. As `load`; raises WeightsError."""
    return load_kind(path, "clip", "openai", "huggingface")


def load_hivg(path):
    """-> HiVG from our file, with separate adapters, or from a released checkpoint, with its adapters folded into the
    weights. As `load`; raises WeightsError."""
    return load_kind(path, "hivg", "released")


def load_released(path):
    """-> HiVG from a released checkpoint, with its adapters folded. As `load`; raises WeightsError."""
    return load_kind(path, "released")


def load_kind(path, *kinds):
    file = read(path)
    if file.kind not in kinds:
        raise WeightsError(f"{shown(path)}: holds {KINDS[file.kind]}; {KINDS[kinds[0]]} is needed here")
    return build(path, file)


class WithoutValues(TorchFunctionMode):
    """Modules made inside are not initialised. On the device "meta" that would compute nothing, but its arithmetic is
    written in Python: the first operation imports torch._dynamo and sympy, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build(path, file):
    """A File -> its model. Empties `file.tensors`. path: for messages. Raises WeightsError."""
    with valid_settings(path, file.kind), torch.device("meta"), WithoutValues():  # neither memory nor time
        model = CLIP(file.config) if isinstance(file.config, CLIPConfig) else HiVG(file.config)
    differences = compare(file.tensors, model.state_dict())
    if differences:
        raise WeightsError(f"{shown(path, 80)}: not {KINDS[file.kind]} as its settings say; {differences}; use the "
                           "file as it was published")
    tensors = {}
    for name in list(file.tensors):
        tensor = file.tensors.pop(name)  # one by one, which halves the memory
        if tensor.is_complex():
            raise WeightsError(f"{shown(path)}: its tensor {shown(name, 70)} is complex; use the file as it was "
                               "published")
        tensor = tensor.float().contiguous()
        is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
        tensors[name] = tensor.clone() if is_part else tensor  # each in a storage of its own
        # the extremes take a tenth of the time of `isfinite` on each element; NaN makes both NaN
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise WeightsError(f"{shown(path)}: its tensor {shown(name, 70)} holds NaN or infinity, so the weights "
                               "are damaged; use an earlier file, or copy or download it again")
    model.load_state_dict(tensors, assign=True)
    model.tokenizer = file.tokenizer
    model.info = file.info
    return model.eval()


def compare(tensors, expected):
    """How names and shapes differ from the expected ones, in words: at most two ways. "" if they are the same."""
    shapes = []
    for name in expected.keys() & tensors.keys():
        found = tuple(tensors[name].shape)
        wanted = tuple(expected[name].shape)
        if found != wanted:
            shapes.append(f"{name} {found} instead of {wanted}")
    differences = []
    for title, names in (("missing", expected.keys() - tensors.keys()),
                         ("left over", tensors.keys() - expected.keys()),
                         ("of another shape", shapes)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            differences.append(f"{title}: {shown(min(names), 70)}{more}")
    return "; ".join(differences[:2])
