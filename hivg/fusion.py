"""Adaptive multi-layer fusion of the text features, the input of every cross-modal bridge.

Text block i gives f^i (B, T, D_t). Each of the K layers used is normalised, scaled position by position and channel
by channel with learned adaptive weights w^i (T, D_t), and all are projected together to the vision width D_v:

    n^i   = LayerNorm_i(f^i)                     ours; left out without norm_weight, as in the released code
    f*^i  = w^i * n^i + n^i                      w^i is the same for every sample
    f*^ml = concat_i[f*^i] W_proj^T + b          (B, T, K D_t) -> (B, T, D_v)

`adaptive_fusion_reference` is the definition of right; `adaptive_fusion` is what the model calls.
"""

import torch.nn.functional as F


def adaptive_fusion_reference(text_states, adaptive_weights, proj_weight, proj_bias,
                              norm_weight=None, norm_bias=None, eps=1e-5):
    """Plain PyTorch: text_states (K, B, T, D_t), adaptive_weights (K, T, D_t), proj_weight (D_v, K D_t), proj_bias
    (D_v), norm_weight and norm_bias (K, D_t) or None for no layer norm -> (B, T, D_v)."""
    K, B, T, D_t = text_states.shape
    f = text_states
    if norm_weight is not None:
        f = F.layer_norm(f, (D_t,), eps=eps)
        f = f * norm_weight[:, None, None] + norm_bias[:, None, None]  # one affine map per text layer
    f = adaptive_weights[:, None] * f + f  # (K, B, T, D_t)
    f = f.permute(1, 2, 0, 3).reshape(B, T, K * D_t)  # concat: layer by layer, batch first throughout
    return F.linear(f, proj_weight, proj_bias)  # (B, T, D_v)


def adaptive_fusion(text_states, adaptive_weights, proj_weight, proj_bias,
                    norm_weight=None, norm_bias=None, eps=1e-5, backend="auto"):
    """The fusion by the fastest backend there is. Arguments and result as `adaptive_fusion_reference`.

    backend: "auto" or "reference" (plain PyTorch).
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"fusion backend must be auto or reference, not {backend!r}")
    return adaptive_fusion_reference(text_states, adaptive_weights, proj_weight, proj_bias, norm_weight, norm_bias, eps)
