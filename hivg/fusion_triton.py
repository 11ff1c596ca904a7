"""The bridge's adaptive fusion as one Triton kernel, and its gradient.

The mathematics (fusion.py), for a row m = (b, t) of the output and text layers i = 0..K-1:

    x_hat_i = (x_i - mean_i) rstd_i           rstd_i = 1 / sqrt(var_i + eps), over the D = D_t channels of the row
    n_i     = x_hat_i * g_i + c_i             g, c: norm_weight, norm_bias; without a norm n_i = x_i
    a_i     = n_i + w_i * n_i                 w_i (T, D): adaptive weights, of the position t
    y       = sum_i a_i P_i^T + p             P_i (D_v, D): columns i D .. (i + 1) D of proj_weight; p: proj_bias

Plain PyTorch writes x_hat, n, w n, a and the concatenation of the a_i to memory and reads each of them back. Here a
small kernel computes mean and rstd of every row, and then each program of the main kernel owns a tile of y. Its operand
a never reaches memory: it is computed in registers, BD channels at a time, in one loop over the blocks of all K layers.
Program 4 in the third of its four steps, for K = 2 layers of two blocks each:

                                          D_v                each step = (layer i, block of BD channels):
                                    +-----+-----+-----+        x (BM, BD), mean, rstd (BM,)  -> x_hat
        P^T (K D, D_v)     layer 0  |     |  .  |     |        g, c (BD,)                    -> n
        in memory                   |     |  .  |     |        w (BM, BD)                    -> a (BM, BD)
                                    +-----+-----+-----+        y += a @ block of P_i^T (BD, BN)
                           layer 1  |     |#####|     | BD   after the last one:
                                    |     |  .  |     |        y + p -> memory
          layer 0   layer 1         +-----+-----+-----+
        +----+----+----+----+       +-----+-----+-----+
    B T |    |    |    |    |       |  0  |  1  |  2  |      y (B T, D_v), in the order of its programs
        +----+----+----+----+       +-----+-----+-----+
        |  . |  . |####|  . | BM    |  3  |##4##|  5  |      a (B T, K D): only #### exists, in registers
        +----+----+----+----+       +-----+-----+-----+
                    BD                      BN

It is one loop, not one per layer, so that loads are prefetched across layer boundaries too. The tiles in a row of tiles
run side by side, so x comes from memory once and then from the cache. Rows are ordered position by position, all b of
t = 0 first: neighbours share a row of w. Where there are too few tiles to keep the GPU busy, the steps are split into
parts (split-K), whose partial sums are written separately and added in a fixed order.

Bytes and operations, ViT-B/16 with K = 12, B = 64, T = 77, D = 512, D_v = 768, bfloat16 (`count` computes them): the
product takes 2 B T K D D_v = 46.5 GFLOP either way. x is 60.6 MB, P 9.4 MB, w 0.9 MB, y 7.6 MB. Plain PyTorch reads
x, and writes and reads back the layer norm, both steps of its affine map, the product with w, the sum and the copy: 14
times 60.6 MB in all. Fused, x is read twice, and y and 8 bytes per row and layer are written. In each step a program
loads 2 (BM BD + BN BD) bytes for 2 BM BN BD operations: with the 128 x 256 tile 85 operations per byte from the cache,
enough to be compute-bound. `python -m hivg.bench compile` prints what registers and shared memory each tile takes.

The gradients; d_z is the derivative of the loss with respect to z, and sums run over the rows unless noted:

    d_p       = sum d_y
    d_a_i     = d_y P_i                       a plain matrix product, (B T, K D): the only large tensor
    d_w_i     = sum over b of d_a_i * n_i     for a_i = (1 + w_i) n_i
    d_n_i     = d_a_i * (1 + w_i)
    d_g_i     = sum d_n_i * x_hat_i,  d_c_i = sum d_n_i
    d_x_hat_i = d_n_i * g_i
    d_x_i     = rstd_i (d_x_hat_i - mean(d_x_hat_i) - x_hat_i mean(d_x_hat_i * x_hat_i))    means over the channels
    d_P_i     = d_y^T a_i                     a plain matrix product

d_x_i follows from x_hat = (x - mean(x)) rstd: a change of x changes x_hat by rstd, minus what the mean takes off all
channels equally (the first mean) and what the variance takes off along x_hat (the second). One kernel reads x and d_a
once, computes everything between the two matrix products, and leaves a in d_a's memory for the second: 4 times 60.6 MB.
Every sum has one owner and a fixed order, so results are deterministic.

Dtypes: statistics, a and sums are float32 (float64 for float64), but a has the inputs' dtype where x, w and P have the
same; products are in the dtype of proj_weight, which is also the output's. float32 products are exact (`ieee`) unless
PyTorch may use TF32. In training, autocast passes x, w, g, c in float32 and P in bfloat16.
"""

import torch
import triton
import triton.language as tl

from hivg.clip import to_autocast

INTERPRETED = triton.knobs.runtime.interpret

# On Hopper a product runs asynchronously while the operand of the next one is computed. Triton before 3.9 may put that
# operand into registers that the product is still reading (github.com/triton-lang/triton, issue 9433, pull request
# 9514), and the result is wrong. Triton waits for a product inside an `if`, so with those versions it is inside one.
SAFE_OVERLAP = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9)

PROGRAMS = 1024  # of gradients_kernel: up to this many, the samples of a position and layer are split among several

# a * b + c as one instruction: the default up to Triton 3.9, but no longer in the next version
OPTIONS = dict(enable_fp_fusion=True)


@triton.jit
def load(pointers, mask, WHOLE: tl.constexpr):
    """Masked load. WHOLE: the mask is all True, so leave it out."""
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0.0)


# Sizes that change from batch to batch are not specialised, or Triton would recompile at the first 1 or multiple of 16.
@triton.jit(do_not_specialize=["M", "T"])
def statistics_kernel(x, mean, rstd, M, T, stride_xk, stride_xb, stride_xt, eps,
                      D: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """x (K, B, T, D) -> mean and rstd (K, M), M = B T. A program owns BM rows of a layer; a whole row fits in BD."""
    i = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # (BM,)
    d = tl.arange(0, BD)  # (BD,)
    # 64 bits: x may have more than 2^31 elements
    at = i.to(tl.int64) * stride_xk + (m // T).to(tl.int64) * stride_xb + (m % T).to(tl.int64) * stride_xt  # (BM,)
    inside = (m < M)[:, None] & (d < D)[None, :]
    row = tl.load(x + at[:, None] + d[None, :], mask=inside, other=0.0).to(ACC)  # (BM, BD)
    row_mean = tl.sum(row, 1) / D  # (BM,)
    # squares around the mean, not E[x^2] - mean^2, which cancels where the mean is large
    apart = tl.where((d < D)[None, :], row - row_mean[:, None], 0.0)
    variance = tl.sum(apart * apart, 1) / D  # (BM,)
    tl.store(mean + i * M + m, row_mean, mask=m < M)
    tl.store(rstd + i * M + m, 1.0 / tl.sqrt(variance + eps), mask=m < M)


@triton.jit(do_not_specialize=["B", "T", "steps"])
def forward_kernel(x, mean, rstd, w, P, p, g, c, y, B, T, stride_xk, stride_xb, stride_xt, stride_wk, stride_wt, steps,
                   K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
                   MIX: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr):
    """x (K, B, T, D), mean and rstd (K, B T), w (K, T, D), P (D_v, K D), p (D_v,), g and c (K, D) -> y (parts, B T,
    D_v). A program owns BM x BN of y, and `steps` of the steps of its sum."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD  # steps of one layer
    TILES: tl.constexpr = (DV + BN - 1) // BN  # of one row of tiles
    WHOLE: tl.constexpr = D % BD == 0 and DV % BN == 0
    part = tl.program_id(1)
    columns = tl.program_id(0) % TILES * BN + tl.arange(0, BN)  # (BN,)
    rows = tl.program_id(0) // TILES * BM + tl.arange(0, BM)  # (BM,)
    in_rows = rows < B * T
    # rows past the end read the last row again and are not stored, so the loop needs no row mask
    rows = tl.minimum(rows, B * T - 1)
    t = rows // B  # position by position
    b = rows % B
    m = b * T + t  # where the row is in y, mean and rstd
    x_rows = x + (b.to(tl.int64) * stride_xb + t.to(tl.int64) * stride_xt)[:, None]  # (BM, 1)
    w_rows = w + (t * stride_wt)[:, None]  # (BM, 1)
    P_rows = P + (columns * (K * D))[None, :]  # (1, BN)
    tile = tl.zeros((BM, BN), ACC)
    # num_stages is given here, as a loop that contains an `if` is not pipelined otherwise
    for step in tl.range(part * steps, tl.minimum(part * steps + steps, K * BLOCKS), num_stages=STAGES):
        i = step // BLOCKS
        d = step % BLOCKS * BD + tl.arange(0, BD)  # (BD,)
        in_d = d < D
        n = load(x_rows + (i.to(tl.int64) * stride_xk + d)[None, :], in_d[None, :], WHOLE).to(ACC)  # (BM, BD)
        if NORM:
            # two values per row, reloaded in every step: kept in registers across the loop, they would force their
            # layout on x, in place of the product's
            r = tl.load(rstd + i * (B * T) + m)  # (BM,)
            offset = tl.load(mean + i * (B * T) + m) * r
            x_hat = n * r[:, None] - offset[:, None]  # (x - mean) rstd as one instruction
            scale = load(g + i * D + d, in_d, WHOLE).to(MIX)  # (BD,)
            shift = load(c + i * D + d, in_d, WHOLE).to(MIX)
            n = x_hat.to(MIX) * scale[None, :] + shift[None, :]
        n = n.to(MIX)
        weights = load(w_rows + (i * stride_wk + d)[None, :], in_d[None, :], WHOLE).to(MIX)
        a = n + weights * n  # (BM, BD); channels past D are multiplied by zeros of P
        block = load(P_rows + (i * D + d)[:, None], in_d[:, None] & (columns < DV)[None, :], WHOLE)  # (BD, BN) of P^T
        if OVERLAP or step >= 0:  # always true, but without OVERLAP the compiler sees an `if`
            tile = tl.dot(a.to(DOT), block.to(DOT), tile, input_precision=PRECISION, out_dtype=ACC)
    if part == 0:
        tile += tl.load(p + columns, mask=columns < DV, other=0.0).to(ACC)[None, :]
    y_rows = y + (part.to(tl.int64) * (B * T) + m)[:, None] * DV  # (BM, 1)
    tl.store(y_rows + columns[None, :], tile.to(y.dtype.element_ty), mask=in_rows[:, None] & (columns < DV)[None, :])


@triton.jit(do_not_specialize=["B", "T", "samples"])
def gradients_kernel(x, mean, rstd, w, g, c, da, dx, dw, dg, dc, B, T, stride_xk, stride_xb, stride_xt, stride_wk,
                     stride_wt, samples, K: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, NEED_X: tl.constexpr,
                     NEED_W: tl.constexpr, NEED_P: tl.constexpr, NEED_G: tl.constexpr, NEED_C: tl.constexpr,
                     ACC: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr):
    """x and da (B T, K D) -> as needed: dx (K, B, T, D), contiguous; a (B T, K D), in place of da; partial sums of dw,
    dg and dc (parts, K, T, D). A program owns position t of layer i for `samples` samples, BB at a time; a whole row
    fits in BD."""
    t = tl.program_id(0)
    i = tl.program_id(1)
    part = tl.program_id(2)
    d = tl.arange(0, BD)  # (BD,)
    in_d = d < D
    # the same for all samples, as position and layer are fixed
    weights = 1.0 + tl.load(w + i * stride_wk + t * stride_wt + d, mask=in_d, other=0.0).to(ACC)  # (BD,)
    if NORM:
        scale = tl.load(g + i * D + d, mask=in_d, other=0.0).to(ACC)  # (BD,)
        shift = tl.load(c + i * D + d, mask=in_d, other=0.0).to(ACC)
    sum_w = tl.zeros((BB, BD), ACC)
    sum_g = tl.zeros((BB, BD), ACC)
    sum_c = tl.zeros((BB, BD), ACC)
    for start in range(part * samples, tl.minimum(part * samples + samples, B), BB):
        b = (start + tl.arange(0, BB)).to(tl.int64)  # (BB,)
        inside = (b < B)[:, None] & in_d[None, :]
        row = (i * B + b) * T + t  # in mean, rstd and dx, which go layer by layer
        x_at = x + (i.to(tl.int64) * stride_xk + b * stride_xb + t.to(tl.int64) * stride_xt)[:, None] + d[None, :]
        x_hat = tl.load(x_at, mask=inside, other=0.0).to(ACC)  # (BB, BD)
        n = x_hat
        if NORM:
            r = tl.load(rstd + row, mask=b < B, other=0.0)  # (BB,)
            offset = tl.load(mean + row, mask=b < B, other=0.0) * r
            x_hat = tl.where(inside, x_hat * r[:, None] - offset[:, None], 0.0)
            n = x_hat * scale[None, :] + shift[None, :]
        da_at = da + ((b * T + t) * (K * D) + i * D)[:, None] + d[None, :]
        if NEED_X or NEED_W or NEED_G or NEED_C:
            back = tl.load(da_at, mask=inside, other=0.0).to(ACC)  # d_a (BB, BD)
            if NEED_W:
                sum_w += back * n
            back = back * weights[None, :]  # d_n
            if NEED_G:
                sum_g += back * x_hat
            if NEED_C:
                sum_c += back
            if NEED_X:
                if NORM:
                    back = back * scale[None, :]  # d_x_hat
                    along = tl.sum(back * x_hat, 1) / D  # (BB,)
                    back = r[:, None] * (back - (tl.sum(back, 1) / D)[:, None] - x_hat * along[:, None])
                tl.store(dx + row[:, None] * D + d[None, :], back.to(dx.dtype.element_ty), mask=inside)
        if NEED_P:  # last, as it overwrites d_a
            tl.store(da_at, (n * weights[None, :]).to(da.dtype.element_ty), mask=inside)
    out = ((part * K + i) * T + t).to(tl.int64) * D + d
    if NEED_W:
        tl.store(dw + out, tl.sum(sum_w, 0), mask=in_d)
    if NEED_G:
        tl.store(dg + out, tl.sum(sum_g, 0), mask=in_d)
    if NEED_C:
        tl.store(dc + out, tl.sum(sum_c, 0), mask=in_d)


# ---- from tensors to launches

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def machine(device):
    """-> major compute capability and number of multiprocessors; an H100's where there is no GPU."""
    if device.type != "cuda":
        return 9, 132
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


def choose_tile(M, DV, x, w, P, major, processors):
    """-> BM, BN, BD and options of forward_kernel for M rows: as large as fits into registers and shared memory without
    spilling (`python -m hivg.bench compile`), smaller where that would leave processors idle. x, w, P: dtypes."""
    if P not in (torch.float16, torch.bfloat16) or torch.float64 in (x, w):
        # here both operands of a product are in registers, unless it may use TF32
        return dict(BM=32, BN=64, BD=32, num_warps=4, num_stages=2)
    # x or w in float32 take twice the space: halve the block of channels, to keep as many blocks in flight
    depth = dict(BD=32, num_stages=4) if 4 in (x.itemsize, w.itemsize) else dict(BD=64, num_stages=3)
    if major == 9 and SAFE_OVERLAP:
        # one program per processor: its products run while it computes the next operand
        large = dict(BM=128, BN=256, num_warps=8) | depth
        wanted = 0.6 * processors
    else:
        # two programs per processor, where its shared memory holds both (the 100 KiB of consumer GPUs do not): one
        # computes its operand during the other's product
        large = dict(BM=64, BN=256, BD=32, num_warps=4, num_stages=3)
        wanted = 1.2 * processors
    if triton.cdiv(M, large["BM"]) * triton.cdiv(DV, large["BN"]) >= wanted:
        return large
    return dict(BM=64 if M > 16 else 16, BN=128, num_warps=4) | depth


def split_sum(K, M, D, DV, tile, processors):
    """-> number of tiles of y, number of parts that each tile's sum is split into, steps per part."""
    tiles = triton.cdiv(M, tile["BM"]) * triton.cdiv(DV, tile["BN"])
    total = K * triton.cdiv(D, tile["BD"])
    # enough parts to occupy idle processors; with fewer than two steps a part costs more than it saves
    parts = max(1, min(processors // tiles, total // 2))
    steps = triton.cdiv(total, parts)
    return tiles, triton.cdiv(total, steps), steps


def choose_types(x, w, P):
    """dtypes of x, w and P -> those of all sums, of a before the product, and of the product."""
    sums = torch.float64 if torch.float64 in (x, w, P) else torch.float32
    product = sums if sums == torch.float64 else P
    if INTERPRETED and P == torch.bfloat16:
        product = sums  # the interpreter cannot compute in bfloat16
    # a is computed in the product's dtype if all inputs have it: two values per instruction
    mix = product if x == w == P else sums
    return sums, mix, product


def dense_rows(x):
    """x with contiguous channels; there may be gaps between rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("hivg::fusion_statistics", mutates_args=())
def statistics(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x (K, B, T, D) -> mean and rstd (K, B T), float64 for float64, else float32. It is a separate operator because it
    depends on no bridge's parameters: where a whole model is compiled, one call serves all its bridges."""
    K, B, T, D = x.shape
    x = dense_rows(x)
    mean = x.new_empty(K, B * T, dtype=torch.promote_types(x.dtype, torch.float32))
    rstd = torch.empty_like(mean)
    if mean.numel():
        BD = triton.next_power_of_2(D)
        BM = max(1, 4096 // BD)  # 32 values per thread
        grid = triton.cdiv(B * T, BM), K
        with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
            statistics_kernel[grid](x, mean, rstd, B * T, T, *x.stride()[:3], eps, D=D, ACC=TYPES[mean.dtype],
                                    BM=BM, BD=BD, **OPTIONS)
    return mean, rstd


@statistics.register_fake
def _(x, eps):
    K, B, T, _ = x.shape
    mean = x.new_empty(K, B * T, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, torch.empty_like(mean)


@torch.library.custom_op("hivg::fusion", mutates_args=())
def forward(x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor | None, w: torch.Tensor, P: torch.Tensor,
            p: torch.Tensor, g: torch.Tensor | None, c: torch.Tensor | None) -> torch.Tensor:
    """In the letters of the opening: x (K, B, T, D), w (K, T, D), P (D_v, K D), p (D_v,) and, all or none, mean and
    rstd (K, B T), g and c (K, D) -> y (B, T, D_v) in P's dtype."""
    K, B, T, D = x.shape
    DV = len(P)
    y = P.new_empty(B, T, DV)
    if not y.numel():
        return y
    sums, mix, product = choose_types(x.dtype, w.dtype, P.dtype)
    major, processors = machine(x.device)
    tile = choose_tile(B * T, DV, x.dtype, w.dtype, P.dtype, major, processors)
    tiles, parts, steps = split_sum(K, B * T, D, DV, tile, processors)
    out = y if parts == 1 else P.new_empty(parts, B, T, DV, dtype=sums)
    x = dense_rows(x)
    w = dense_rows(w)
    P, p, g, c = [v if v is None else v.contiguous() for v in (P, p, g, c)]
    # not allow_tf32, the older name, which raises once a program has set this one
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    with torch.cuda.device_of(x):
        forward_kernel[tiles, parts](
            x, mean, rstd, w, P, p, g, c, out, B, T, *x.stride()[:3], *w.stride()[:2], steps, K=K, D=D, DV=DV,
            NORM=g is not None, ACC=TYPES[sums], MIX=TYPES[mix], DOT=TYPES[product],
            PRECISION="tf32" if tf32 else "ieee", OVERLAP=SAFE_OVERLAP or major != 9, STAGES=tile["num_stages"],
            **tile, **OPTIONS)
    return y if parts == 1 else out.sum(0).to(P.dtype)


@forward.register_fake
def _(x, mean, rstd, w, P, p, g, c):
    return P.new_empty(*x.shape[1:3], len(P))


@torch.library.custom_op("hivg::fusion_backward", mutates_args=())
def backward(dy: torch.Tensor, x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor | None, w: torch.Tensor,
             P: torch.Tensor, g: torch.Tensor | None, c: torch.Tensor | None, needs: list[bool]) -> list[torch.Tensor]:
    """Gradients of x, w, P, p, g, c as far as `needs` asks for them; an empty tensor for each of the others."""
    K, B, T, D = x.shape
    need_x, need_w, need_P, need_p, need_g, need_c = needs
    sums, _, _ = choose_types(x.dtype, w.dtype, P.dtype)
    dy = dy.reshape(B * T, len(P))
    # (B T, K D); just memory for a if nothing needs d_a
    da = dy @ P if need_x or need_w or need_g or need_c else P.new_empty(B * T, K * D)
    BD = triton.next_power_of_2(D)
    BB = max(1, min(triton.next_power_of_2(B), 2048 // BD))
    # a program takes one block of BB samples, or several where there would be thousands of programs
    programs = max(1, min(triton.cdiv(B, BB), PROGRAMS // max(1, K * T)))
    samples = BB * max(1, triton.cdiv(B, BB * programs))
    parts = triton.cdiv(B, samples)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None  # contiguous, whatever x is
    dw, dg, dc = [x.new_empty(parts, K, T, D, dtype=sums) if need else None for need in (need_w, need_g, need_c)]
    if B * T and (need_x or need_w or need_P or need_g or need_c):
        x = dense_rows(x)
        w = dense_rows(w)
        g, c = [v if v is None else v.contiguous() for v in (g, c)]
        with torch.cuda.device_of(x):
            gradients_kernel[T, K, parts](
                x, mean, rstd, w, g, c, da, dx, dw, dg, dc, B, T, *x.stride()[:3], *w.stride()[:2], samples, K=K, D=D,
                NORM=g is not None, NEED_X=need_x, NEED_W=need_w, NEED_P=need_P, NEED_G=need_g, NEED_C=need_c,
                ACC=TYPES[sums], BB=BB, BD=BD, **OPTIONS)
    grads = [dx,
             dw.sum(0).to(w.dtype) if need_w else None,
             dy.T @ da if need_P else None,  # da holds a now
             dy.sum(0, dtype=sums).to(P.dtype) if need_p else None,
             dg.sum((0, 2)).to(g.dtype) if need_g else None,
             dc.sum((0, 2)).to(c.dtype) if need_c else None]
    return [x.new_empty(0) if grad is None else grad for grad in grads]


@backward.register_fake
def _(dy, x, mean, rstd, w, P, g, c, needs):
    like = x, w, P, P[:, 0], g, c
    return [torch.empty(v.shape, dtype=v.dtype, device=v.device) if need else x.new_empty(0)
            for v, need in zip(like, needs)]


def remember(ctx, inputs, output):
    x, mean, rstd, w, P, p, g, c = inputs
    ctx.save_for_backward(x, mean, rstd, w, P, g, c)


def differentiate(ctx, dy):
    need_x, _, _, need_w, need_P, need_p, need_g, need_c = ctx.needs_input_grad
    needs = [need_x, need_w, need_P, need_p, need_g, need_c]
    grads = backward(dy, *ctx.saved_tensors, needs)
    dx, dw, dP, dp, dg, dc = [grad if need else None for grad, need in zip(grads, needs)]
    return dx, None, None, dw, dP, dp, dg, dc  # dx includes the path through mean and rstd


forward.register_autograd(differentiate, setup_context=remember)


def adaptive_fusion(text_states, adaptive_weights, proj_weight, proj_bias, norm_weight=None, norm_bias=None, eps=1e-5):
    """fusion.adaptive_fusion with these kernels. Under autocast the product is in autocast's dtype."""
    proj_weight = to_autocast(proj_weight)
    proj_bias = to_autocast(proj_bias)
    mean = rstd = None
    if norm_weight is not None:
        mean, rstd = statistics(text_states.detach(), eps)
    return forward(text_states, mean, rstd, adaptive_weights, proj_weight, proj_bias, norm_weight, norm_bias)


def count(B=64, T=77, K=12, D=512, DV=768, element=2):
    """-> {"operations": of the product, and the bytes of each tensor by name}. element: bytes per value."""
    sizes = {"x": K * B * T * D, "w": K * T * D, "P": DV * K * D, "y": B * T * DV}
    return {"operations": 2 * B * T * K * D * DV} | {name: element * n for name, n in sizes.items()}
