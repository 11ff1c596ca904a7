"""Adaptive multi-layer fusion of the text features, the input of every cross-modal bridge.

Text block i gives f^i (B, T, D_t). Each of the K layers used is normalised, scaled position by position and channel
by channel with learned adaptive weights w^i (T, D_t), and all are projected together to the vision width D_v:

    n^i   = LayerNorm_i(f^i)                     ours; left out without norm_weight, as in the released code
    f*^i  = w^i * n^i + n^i                      w^i is the same for every sample
    f*^ml = concat_i[f*^i] W_proj^T + b          (B, T, K D_t) -> (B, T, D_v)

`adaptive_fusion_reference` defines what is right; `adaptive_fusion` is what the model calls. On a GPU that is one
Triton kernel, after a small one for the norm's mean and deviation (fusion_triton.py).
"""

import sys
from functools import cache
from importlib.util import find_spec

import torch.nn.functional as F

HAS_TRITON = find_spec("triton") is not None  # looked up once: the model chooses a backend at every bridge


def adaptive_fusion_reference(text_states, adaptive_weights, proj_weight, proj_bias,
                              norm_weight=None, norm_bias=None, eps=1e-5):
    """Plain PyTorch: text_states (K, B, T, D_t), adaptive_weights (K, T, D_t), proj_weight (D_v, K D_t), proj_bias
    (D_v), norm_weight and norm_bias (K, D_t) or None for no layer norm -> (B, T, D_v). All of one dtype, except under
    autocast."""
    K, B, T, D_t = text_states.shape
    f = text_states
    if norm_weight is not None:
        # n^i = LayerNorm_i(f^i): each text layer has its own affine map
        f = F.layer_norm(f, (D_t,), eps=eps)
        f = f * norm_weight[:, None, None] + norm_bias[:, None, None]  # (K, B, T, D_t)
    # f*^i = w^i * n^i + n^i: an adaptive weight of zero keeps the feature unchanged
    f = adaptive_weights[:, None] * f + f  # (K, B, T, D_t)
    # concat_i[f*^i], batch first throughout. The released code transposes it to (T, B, ..), which its attention then
    # reads as (B, T, ..): that mixes the samples of a batch.
    f = f.permute(1, 2, 0, 3).reshape(B, T, K * D_t)  # (B, T, K D_t)
    # f*^ml = concat_i[f*^i] W_proj^T + b
    return F.linear(f, proj_weight, proj_bias)  # (B, T, D_v)


def adaptive_fusion(text_states, adaptive_weights, proj_weight, proj_bias,
                    norm_weight=None, norm_bias=None, eps=1e-5, backend="auto"):
    """The fusion, by the fastest backend available. Arguments and result as for `adaptive_fusion_reference`; the result
    has the dtype of proj_weight, or autocast's under autocast.

    backend: "reference" (plain PyTorch), "triton" (fusion_triton.py), or "auto", the choice of `choose_backend`.
    Raises ValueError for another, ImportError for "triton" where it is not installed.
    """
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"fusion backend must be auto, reference or triton, not {backend!r}")
    if backend == "auto":
        backend = choose_backend(text_states.device.type)
    if backend == "triton":
        # imported only when needed: Triton exists only for Linux
        from hivg.fusion_triton import adaptive_fusion as fuse
    else:
        fuse = adaptive_fusion_reference
    return fuse(text_states, adaptive_weights, proj_weight, proj_bias, norm_weight, norm_bias, eps)


def choose_backend(device_type):
    """The backend for a kind of device: "triton" on a GPU where Triton works, else "reference"."""
    return "triton" if device_type == "cuda" and HAS_TRITON and triton_works() else "reference"


@cache
def triton_works():
    """Whether Triton can launch a kernel here: for that it compiles a small C program. Says so once if it cannot."""
    from triton.runtime import driver
    try:
        driver.active.utils  # compiled here, or found in Triton's cache
    except Exception as error:  # RuntimeError without a compiler, CalledProcessError without Python's headers
        print(f"fusion in plain PyTorch: Triton does not work here ({type(error).__name__}); install gcc and Python's "
              "headers (python3-dev)", file=sys.stderr)
        return False
    return True
