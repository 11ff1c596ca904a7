"""The bridge's adaptive fusion as one Triton kernel, and its gradient.

The mathematics (fusion.py), for a row m = (b, t) of the output and text layers i = 1..K:

    h_i = (x_i - mean_i) r_i                  r_i = 1 / sqrt(var_i + eps), over the D = D_t channels of the row
    n_i = h_i * g_i + c_i                     g, c: norm_weight, norm_bias; without a norm n_i = x_i
    a_i = n_i + w_i * n_i                     w_i (T, D): adaptive weights, of the position t
    y   = sum_i a_i P_i^T + p                 P_i (D_v, D): columns i D .. (i + 1) D of proj_weight

Plain PyTorch writes h, n, w n, a and the concatenation of the a_i to memory and reads each again. Here a program owns a
tile of y and makes its operand a on the way in, a block of channels at a time:

             D_v                            for each layer i:
         +---+---+---+                          mean, r of the tile's rows              (one pass over x_i)
    B T  |   | y |   |  BM x BN                 for each block of BD channels:
         +---+---+---+                              x (BM, BD), w (BM, BD), g, c (BD,) -> a (BM, BD)
         |   |   |   |                              y += a @ P_i^T block (BD, BN)
         +---+---+---+

Bytes and operations, ViT-B/16 with K = 12, B = 64, T = 77, D = 512, D_v = 768, bfloat16 (`count` computes them): the
product is 2 B T K D D_v = 46.5 GFLOP in either way. x is 60.6 MB, P 9.4 MB, w 0.9 MB, y 7.6 MB. Plain PyTorch reads x
and writes and reads again its layer norm, two steps of the affine map, product with w, sum and copy: 14 times 60.6 MB
in all; fused, x is read once from memory and, for each of the D_v / BN column tiles and both passes, again from the
cache. Nothing but y is written. What one program reads it uses BN = 128 times, so the kernel should be bound by the
products.

The gradients, d_ for the derivative of the loss by what follows, sums over the rows unless they say otherwise:

    d_p     = sum d_y
    d_P_i   = d_y^T a_i                       a_i is made again on the way in, as above
    d_a_i   = d_y P_i                         a plain product, (B T, K D); the one large tensor there is
    d_w_i   = sum over b of d_a_i * n_i       for a_i = (1 + w_i) n_i
    d_n_i   = d_a_i * (1 + w_i)
    d_g_i   = sum d_n_i * h_i,  d_c_i = sum d_n_i
    d_h_i   = d_n_i * g_i
    d_x_i   = r_i (d_h_i - mean(d_h_i) - h_i mean(d_h_i * h_i))      means over the channels of the row

The last because h = (x - mean(x)) r: moving x moves h by r, less what the mean takes off all channels alike (the
first mean) and what the spread takes off along h (the second). Every sum has one owner and one order: the same bits
each time.

Numbers: statistics and sums in float32 (float64 for float64); the product in the type of proj_weight, which is also the
output's. float32 products are exact (`ieee`) unless PyTorch may use TF32.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
ROWS, CHANNELS = 64, 64  # BM and BD of the kernels without a product


def tiles(dtype):
    """BM, BN, BD of the kernels with a product, as large as registers and shared memory hold without spilling (`python
    -m hivg.bench compile`): float32 has no tensor cores to go through, so its products need both operands in
    registers."""
    if dtype in (torch.float16, torch.bfloat16):
        return dict(BM=64, BN=128, BD=64, num_warps=8, num_stages=3)
    return dict(BM=32, BN=64, BD=32, num_warps=4, num_stages=2)


@triton.jit
def load_block(x, rows_at, in_rows, d, D, ACC: tl.constexpr):
    """(BM, BD): channels d (BD,) of the rows whose addresses are rows_at (BM,); 0 outside."""
    mask = in_rows[:, None] & (d < D)[None, :]
    return tl.load(x + rows_at[:, None] + d[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def row_statistics(x, rows_at, in_rows, D, eps, BM: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):
    """-> mean (BM,) and r (BM,) of rows of D channels, block by block: the mean and the sum of squares around it of
    what was seen are joined with those of the next block (Chan et al. 1979), which loses no digits to large means."""
    mean = tl.zeros((BM,), ACC)
    squares = tl.zeros((BM,), ACC)
    seen = tl.zeros((1,), ACC)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        n = tl.minimum(BD, D - start).to(ACC)
        block = load_block(x, rows_at, in_rows, d, D, ACC)  # (BM, BD)
        block_mean = tl.sum(block, 1) / n
        apart = tl.where((d < D)[None, :], block - block_mean[:, None], 0.0)
        shift = block_mean - mean
        share = n / (seen + n)
        squares += tl.sum(apart * apart, 1) + shift * shift * share * seen
        mean += shift * share
        seen += n
    return mean, 1.0 / tl.sqrt(squares / D + eps)


@triton.jit
def normalised(x, rows_at, in_rows, mean, r, g, c, i, d, D, NORM: tl.constexpr, ACC: tl.constexpr):
    """-> h and n (BM, BD) of layer i; 0 in channels outside, for g and c are 0 there."""
    h = load_block(x, rows_at, in_rows, d, D, ACC)
    if NORM:
        h = (h - mean[:, None]) * r[:, None]
        scale = tl.load(g + i * D + d, mask=d < D, other=0.0).to(ACC)  # (BD,)
        shift = tl.load(c + i * D + d, mask=d < D, other=0.0).to(ACC)
        return h, h * scale[None, :] + shift[None, :]
    return h, h


@triton.jit
def weights_of(w, i, t, in_rows, d, D, swk, swt, ACC: tl.constexpr):
    """1 + w_i at positions t (BM,) and channels d (BD,): (BM, BD)."""
    mask = in_rows[:, None] & (d < D)[None, :]
    return 1.0 + tl.load(w + i * swk + t[:, None] * swt + d[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def forward_kernel(x, w, P, p, g, c, y, M, T, D, DV, sxk, sxb, sxt, swk, swt, eps, K: tl.constexpr,
                   NORM: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """x (K, B, T, D), w (K, T, D), P (D_v, K D), p (D_v,), g and c (K, D) -> y (M, D_v), M = B T."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)  # (BM,)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)  # (BN,)
    in_rows, in_columns = rows < M, columns < DV
    b, t = (rows // T).to(tl.int64), rows % T
    tile = tl.zeros((BM, BN), ACC)
    for i in range(K):
        rows_at = b * sxb + t * sxt + i * sxk
        mean, r = tl.zeros((BM,), ACC), tl.zeros((BM,), ACC)
        if NORM:
            mean, r = row_statistics(x, rows_at, in_rows, D, eps, BM, BD, ACC)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            _, n = normalised(x, rows_at, in_rows, mean, r, g, c, i, d, D, NORM, ACC)
            a = n * weights_of(w, i, t, in_rows, d, D, swk, swt, ACC)  # (BM, BD)
            block = tl.load(P + columns[None, :] * (K * D) + (i * D + d)[:, None],
                            mask=in_columns[None, :] & (d < D)[:, None], other=0.0)  # (BD, BN) of P^T
            tile = tl.dot(a.to(DOT), block.to(DOT), tile, input_precision=PRECISION, out_dtype=ACC)
    tile += tl.load(p + columns, mask=in_columns, other=0.0).to(ACC)[None, :]
    tl.store(y + rows[:, None].to(tl.int64) * DV + columns[None, :], tile.to(y.dtype.element_ty),
             mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def statistics_kernel(x, mean_out, r_out, M, T, D, sxk, sxb, sxt, eps, ACC: tl.constexpr, BM: tl.constexpr,
                      BD: tl.constexpr):
    """x (K, B, T, D) -> mean and r (K, M): what the gradients need of each row, made once for all of them."""
    rows, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    in_rows = rows < M
    rows_at = (rows // T).to(tl.int64) * sxb + rows % T * sxt + i * sxk
    mean, r = row_statistics(x, rows_at, in_rows, D, eps, BM, BD, ACC)
    tl.store(mean_out + i * M + rows, mean, mask=in_rows)
    tl.store(r_out + i * M + rows, r, mask=in_rows)


@triton.jit
def proj_kernel(x, w, g, c, dy, mean, r, dP, M, T, D, DV, sxk, sxb, sxt, swk, swt, K: tl.constexpr,
                NORM: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """d_P_i = d_y^T a_i: a program owns BN x BD of dP (D_v, K D) and walks the rows of dy (M, D_v)."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    blocks = tl.cdiv(D, BD)
    i, d = tl.program_id(1) // blocks, tl.program_id(1) % blocks * BD + tl.arange(0, BD)
    tile = tl.zeros((BN, BD), ACC)
    for start in range(0, M, BM):
        rows = start + tl.arange(0, BM)
        in_rows = rows < M
        t = rows % T
        rows_at = (rows // T).to(tl.int64) * sxb + t * sxt + i * sxk
        m, s = tl.zeros((BM,), ACC), tl.zeros((BM,), ACC)
        if NORM:
            m = tl.load(mean + i * M + rows, mask=in_rows, other=0.0)
            s = tl.load(r + i * M + rows, mask=in_rows, other=0.0)
        _, n = normalised(x, rows_at, in_rows, m, s, g, c, i, d, D, NORM, ACC)
        a = n * weights_of(w, i, t, in_rows, d, D, swk, swt, ACC)  # (BM, BD)
        back = tl.load(dy + rows[None, :].to(tl.int64) * DV + columns[:, None],
                       mask=in_rows[None, :] & (columns < DV)[:, None], other=0.0)  # (BN, BM) of d_y^T
        tile = tl.dot(back.to(DOT), a.to(DOT), tile, input_precision=PRECISION, out_dtype=ACC)
    tl.store(dP + columns[:, None] * (K * D) + (i * D + d)[None, :], tile.to(dP.dtype.element_ty),
             mask=(columns < DV)[:, None] & (d < D)[None, :])


@triton.jit
def weights_kernel(x, w, g, c, da, mean, r, dw, dg, dc, B, T, D, KD, sxk, sxb, sxt, swk, swt,
                   NORM: tl.constexpr, NEED_W: tl.constexpr, NEED_G: tl.constexpr, NEED_C: tl.constexpr,
                   ACC: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr):
    """d_w_i, and what each position adds to d_g_i and d_c_i, of these what is needed: a program owns one position and
    BD channels of one layer of dw, dg, dc (K, T, D) and walks the batch; da (B T, K D)."""
    t, i, d = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BD + tl.arange(0, BD)
    sum_w, sum_g, sum_c = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    for start in range(0, B, BB):
        b = (start + tl.arange(0, BB)).to(tl.int64)
        in_rows = b < B
        rows = b * T + t
        m, s = tl.zeros((BB,), ACC), tl.zeros((BB,), ACC)
        if NORM:
            m = tl.load(mean + i * B * T + rows, mask=in_rows, other=0.0)
            s = tl.load(r + i * B * T + rows, mask=in_rows, other=0.0)
        h, n = normalised(x, b * sxb + t * sxt + i * sxk, in_rows, m, s, g, c, i, d, D, NORM, ACC)
        back = load_block(da, rows * KD + i * D, in_rows, d, D, ACC)  # (BB, BD), 0 outside
        if NEED_W:
            sum_w += tl.sum(back * n, 0)
        if NEED_G or NEED_C:
            back *= weights_of(w, i, tl.zeros((BB,), tl.int32) + t, in_rows, d, D, swk, swt, ACC)
        if NEED_G:
            sum_g += tl.sum(back * h, 0)
        if NEED_C:
            sum_c += tl.sum(back, 0)
    at = (i * T + t) * D + d
    if NEED_W:
        tl.store(dw + at, sum_w.to(dw.dtype.element_ty), mask=d < D)
    if NEED_G:
        tl.store(dg + at, sum_g, mask=d < D)
    if NEED_C:
        tl.store(dc + at, sum_c, mask=d < D)


@triton.jit
def states_kernel(x, w, g, c, da, mean, r, dx, M, T, D, KD, sxk, sxb, sxt, swk, swt, NORM: tl.constexpr,
                  ACC: tl.constexpr, BD: tl.constexpr):
    """d_x_i of one row of one layer; BD holds the whole row. dx (K, B, T, D), contiguous."""
    m, i, d = tl.program_id(0), tl.program_id(1), tl.arange(0, BD)
    row = m + tl.zeros((1,), tl.int32)
    inside, t = row < M, row % T
    rows_at = (row // T).to(tl.int64) * sxb + t * sxt + i * sxk
    back = load_block(da, row.to(tl.int64) * KD + i * D, inside, d, D, ACC)  # (1, BD)
    back *= weights_of(w, i, t, inside, d, D, swk, swt, ACC)
    if NORM:
        at = i * M + row
        s = tl.load(r + at)
        h, _ = normalised(x, rows_at, inside, tl.load(mean + at), s, g, c, i, d, D, NORM, ACC)
        h = tl.where((d < D)[None, :], h, 0.0)
        back *= tl.load(g + i * D + d, mask=d < D, other=0.0).to(ACC)[None, :]
        back = s[:, None] * (back - tl.sum(back, 1)[:, None] / D - h * (tl.sum(back * h, 1)[:, None] / D))
    out = dx + (i * M + row).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out, back.to(dx.dtype.element_ty), mask=(d < D)[None, :])


# ---- from tensors to launches

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def settings(x, w, P):
    """What every kernel is told: sizes, strides, types."""
    acc = tl.float64 if torch.float64 in (x.dtype, P.dtype) else tl.float32
    dot = acc if INTERPRETED or acc == tl.float64 else TYPES[P.dtype]  # the interpreter has no products in bfloat16
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    strides = (*x.stride()[:3], *w.stride()[:2])
    return strides, dict(ACC=acc), dict(DOT=dot, PRECISION=precision)


def prepared(x, w, P, p, g, c):
    """The tensors as the kernels read them: no gaps, but between the rows of x and w."""
    x, w = (v if v.stride(-1) == 1 else v.contiguous() for v in (x, w))
    return x, w, *(v if v is None else v.contiguous() for v in (P, p, g, c))


@torch.library.custom_op("hivg::adaptive_fusion", mutates_args=())
def forward(x: torch.Tensor, w: torch.Tensor, P: torch.Tensor, p: torch.Tensor, g: torch.Tensor | None,
            c: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Arguments of adaptive_fusion by the letters above: x (K, B, T, D), w (K, T, D), P (D_v, K D), p (D_v,), g and c
    (K, D) or None -> y (B, T, D_v) in the type of P."""
    (K, B, T, D), DV = x.shape, len(P)
    y = torch.empty(B, T, DV, dtype=P.dtype, device=x.device)
    if y.numel():
        x, w, P, p, g, c = prepared(x, w, P, p, g, c)
        strides, types, dots = settings(x, w, P)
        tile = tiles(P.dtype)
        grid = triton.cdiv(B * T, tile["BM"]), triton.cdiv(DV, tile["BN"])
        forward_kernel[grid](x, w, P, p, g, c, y, B * T, T, D, DV, *strides, eps, K=K, NORM=g is not None, **types,
                             **dots, **tile)
    return y


@forward.register_fake
def _(x, w, P, p, g, c, eps):
    return P.new_empty(*x.shape[1:3], len(P))


@torch.library.custom_op("hivg::adaptive_fusion_backward", mutates_args=())
def backward(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, P: torch.Tensor, g: torch.Tensor | None,
             c: torch.Tensor | None, eps: float, needs: list[bool]) -> list[torch.Tensor]:
    """The gradients of x, w, P, p, g, c that `needs` asks for; an empty tensor for each of the others."""
    (K, B, T, D), DV, M = x.shape, len(P), x.shape[1] * x.shape[2]
    x, w, P, _, g, c = prepared(x, w, P, None, g, c)
    dy = dy.reshape(M, DV).contiguous()
    strides, types, dots = settings(x, w, P)
    norm = g is not None
    need_x, need_w, need_P, need_p, need_g, need_c = needs
    exact = torch.float64 if types["ACC"] == tl.float64 else torch.float32
    mean, r = (torch.empty(K, M, dtype=exact, device=x.device) for _ in range(2)) if norm else (None, None)
    dx = dw = dP = dp = dg = dc = None
    if norm and (need_x or need_w or need_P or need_g or need_c):
        statistics_kernel[triton.cdiv(M, ROWS), K](x, mean, r, M, T, D, *strides[:3], eps, **types, BM=ROWS,
                                                   BD=CHANNELS)
    if need_p:
        dp = dy.sum(0, dtype=exact).to(P.dtype)
    if need_P:
        dP = torch.empty_like(P)
        tile = tiles(P.dtype)
        grid = triton.cdiv(DV, tile["BN"]), K * triton.cdiv(D, tile["BD"])
        proj_kernel[grid](x, w, g, c, dy, mean, r, dP, M, T, D, DV, *strides, K=K, NORM=norm, **types, **dots, **tile)
    if need_x or need_w or need_g or need_c:
        da = dy @ P  # (M, K D)
        if need_w or need_g or need_c:
            dw, dg, dc = (torch.empty(K, T, D, dtype=dtype, device=x.device) if need else None
                          for dtype, need in ((w.dtype, need_w), (exact, need_g), (exact, need_c)))
            grid = T, K, triton.cdiv(D, CHANNELS)
            weights_kernel[grid](x, w, g, c, da, mean, r, dw, dg, dc, B, T, D, K * D, *strides, NORM=norm,
                                 NEED_W=need_w, NEED_G=need_g, NEED_C=need_c, **types, BB=16, BD=CHANNELS)
            dg, dc = (v if v is None else v.sum(1).to(g.dtype) for v in (dg, dc))
        if need_x:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            states_kernel[M, K](x, w, g, c, da, mean, r, dx, M, T, D, K * D, *strides, NORM=norm, **types,
                                BD=triton.next_power_of_2(D))
    return [grad if need else x.new_empty(0) for grad, need in zip((dx, dw, dP, dp, dg, dc), needs)]


@backward.register_fake
def _(dy, x, w, P, g, c, eps, needs):
    like = (x, w, P, P[:, 0], g, c)
    return [torch.empty(v.shape, dtype=v.dtype, device=v.device) if need else x.new_empty(0)
            for v, need in zip(like, needs)]


def remember(ctx, inputs, output):
    x, w, P, p, g, c, eps = inputs
    ctx.save_for_backward(x, w, P, g, c)
    ctx.eps = eps


def differentiate(ctx, dy):
    x, w, P, g, c = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    grads = torch.ops.hivg.adaptive_fusion_backward(dy, x, w, P, g, c, ctx.eps, needs)
    return *(grad if need else None for grad, need in zip(grads, needs)), None


forward.register_autograd(differentiate, setup_context=remember)


def adaptive_fusion(text_states, adaptive_weights, proj_weight, proj_bias, norm_weight=None, norm_bias=None, eps=1e-5):
    """fusion.adaptive_fusion by these kernels. Under autocast the product is in autocast's type."""
    kind = text_states.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        proj_weight, proj_bias = proj_weight.to(dtype), proj_bias.to(dtype)
    return forward(text_states, adaptive_weights, proj_weight, proj_bias, norm_weight, norm_bias, eps)


def count(B=64, T=77, K=12, D=512, DV=768, element=2):
    """The operations of the product, and the bytes of each tensor: {name: number}."""
    sizes = {"x": K * B * T * D, "w": K * T * D, "P": DV * K * D, "y": B * T * DV}
    return {"operations": 2 * B * T * K * D * DV} | {name: element * n for name, n in sizes.items()}
