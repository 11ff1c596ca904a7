"""The Triton kernels: output and gradients against the float64 reference (in Triton's interpreter where there is no
GPU), what is launched, and training with them."""

from pathlib import Path

import pytest
import torch
from makers import assert_close, calls_of, make_batch, make_hivg, make_training_batch, terms_of

from hivg import fusion
from hivg.fusion import adaptive_fusion, adaptive_fusion_reference

triton = pytest.importorskip("triton")
from hivg import fusion_triton  # noqa: E402  after the check that Triton is there

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
NAMES = ["text_states", "adaptive_weights", "proj_weight", "proj_bias", "norm_weight", "norm_bias"]
SIZES = {  # K, B, T, D_t, D_v
    "ones": (1, 1, 1, 1, 1), "primes": (3, 5, 7, 13, 11), "not powers of two": (2, 3, 6, 24, 40),
    "larger than a block": (2, 18, 4, 70, 130), "blocks filled": (1, 4, 16, 64, 128), "twelve layers": (12, 3, 2, 8, 6),
    "one program for several blocks": (2, 37, 4, 70, 3),  # of 16, 16 and 5 samples
}
NORM = pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])


def make(K, B, T, D, DV, dtype=torch.float64, norm=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)

    tensors = [2 * random(K, B, T, D) + 3, random(K, T, D, scale=0.5), random(DV, K * D, scale=(K * D) ** -0.5),
               random(DV), 1 + random(K, D, scale=0.3), random(K, D, scale=0.3)]
    return [v.requires_grad_() for v in tensors[: 6 if norm else 4]]


def make_dy(K, B, T, D, DV, dtype=torch.float64):
    return torch.randn(B, T, DV, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE, dtype)


def run(f, tensors, dy, **options):
    """-> output and gradients, by name."""
    tensors = [v.detach().requires_grad_(v.requires_grad) for v in tensors]
    y = f(*tensors, **options)
    wanted = {name: v for name, v in zip(NAMES, tensors) if v.requires_grad}
    grads = torch.autograd.grad(y, wanted.values(), dy.to(y.dtype))
    return {"output": y} | dict(zip(wanted, grads))


def run_exact(tensors, dy):
    return run(adaptive_fusion_reference, [v.detach().double().requires_grad_() for v in tensors], dy.double())


def assert_at_most_twice(ours, plain, exact, dtype):
    """The largest error of each of our tensors against plain PyTorch's, both relative to the largest value."""
    for name, right in exact.items():
        largest = right.abs().max().clamp(min=1e-30)
        error, allowed = ((found[name].double() - right).abs().max() / largest for found in (ours, plain))
        # plain PyTorch can be exact by luck on a few values: half a rounding unit is always allowed
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2, (name, error.item(), allowed.item())


# ---- correctness

@NORM
@pytest.mark.parametrize("size", SIZES)
def test_float64_is_exact(size, norm, monkeypatch):
    if size == "one program for several blocks":  # as with twelve layers of 77 positions
        monkeypatch.setattr(fusion_triton, "PROGRAMS", 1)
    tensors = make(*SIZES[size], norm=norm)
    if size == "ones" and norm:
        tensors[0].requires_grad_(False)  # a row of one channel is its own mean: no gradient to compare
    dy = make_dy(*SIZES[size])
    ours = run(adaptive_fusion, tensors, dy, backend="triton")
    exact = run(adaptive_fusion_reference, tensors, dy)
    assert ours.keys() == exact.keys()
    for name in exact:
        assert_close(name, ours[name], exact[name], 1e-11)


@NORM
@pytest.mark.parametrize("dtype, is_autocast", [(torch.float32, False), *(
    (dtype, is_autocast) for dtype in (torch.float16, torch.bfloat16) for is_autocast in (False, True))])
@pytest.mark.parametrize("size", ["primes", "not powers of two", "larger than a block"])
def test_error_is_at_most_twice_plain_pytorchs(size, norm, dtype, is_autocast):
    """In training x, w, g and c are float32, and autocast casts P and p to `dtype`. Here P and p hold values that the
    cast does not change, so all of the error is the fusion's own."""
    tensors = make(*SIZES[size], torch.float32 if is_autocast else dtype, norm)
    for v in tensors[2:4] if is_autocast else ():
        v.data = v.data.to(dtype).float()
    dy = make_dy(*SIZES[size], dtype)
    with torch.autocast(DEVICE, dtype if is_autocast else torch.bfloat16, enabled=is_autocast):
        ours = run(adaptive_fusion, tensors, dy, backend="triton")
        plain = run(adaptive_fusion, tensors, dy, backend="reference")
    if is_autocast:
        assert ours["output"].dtype == plain["output"].dtype == dtype
        assert all(ours[name].dtype == torch.float32 for name in ours if name != "output")
    assert_at_most_twice(ours, plain, run_exact(tensors, dy), dtype)


@pytest.mark.parametrize("processors", [1, 40])  # the largest tiles; smaller ones with split sums
@pytest.mark.parametrize("types", ["narrow", "autocast"])
@pytest.mark.parametrize("major", [8, 9] if DEVICE == "cpu" else [torch.cuda.get_device_capability()[0]])
@pytest.mark.parametrize("overlap", [True, False])  # of a product with building the next operand
def test_every_tile(major, types, processors, overlap, monkeypatch):
    if overlap and not (fusion_triton.INTERPRETED or fusion_triton.SAFE_OVERLAP):
        pytest.skip("not safe with this Triton")
    if major != 9 and not overlap:
        pytest.skip("only Hopper waits")
    monkeypatch.setattr(fusion_triton, "SAFE_OVERLAP", overlap)
    monkeypatch.setattr(fusion_triton, "machine", lambda device: (major, processors))
    size = (2, 3, 45, 72, 260)  # several tiles of rows and of columns, the last ones partial
    tensors = make(*size, torch.float16 if types == "narrow" else torch.float32)
    for v in tensors[2:4]:
        v.data = v.data.half().to(v.dtype)
    dy = make_dy(*size, torch.float16)
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16, enabled=types == "autocast"):
        ours = adaptive_fusion(*tensors, backend="triton")
        plain = adaptive_fusion(*tensors, backend="reference")
    exact = {"output": run_exact(tensors, dy)["output"]}
    assert_at_most_twice({"output": ours}, {"output": plain}, exact, torch.float16)


def test_large_means_lose_no_digits():
    """Rows with mean 1,000 and standard deviation 2: in float32 E[x^2] - mean^2 would lose the deviation."""
    x, *rest = make(1, 2, 3, 200, 8, torch.float32)
    x = (x.detach() + 1000).requires_grad_()
    exact = adaptive_fusion_reference(*(v.double() for v in (x, *rest)))
    assert_close("output", adaptive_fusion(x, *rest, backend="triton"), exact.float(), 2e-3)


def test_the_same_bits_twice():
    tensors = make(*SIZES["primes"], torch.float32)
    dy = make_dy(*SIZES["primes"], torch.float32)
    first = run(adaptive_fusion, tensors, dy, backend="triton")
    again = run(adaptive_fusion, tensors, dy, backend="triton")
    assert all(torch.equal(first[name], again[name]) for name in first)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
def test_the_same_right_bits_a_hundred_times(dtype):
    """Fails if a product's operand is overwritten before it is read (triton-lang/triton issue 9433)."""
    size = (12, 64, 77, 512, 768)
    tensors = make(*size, dtype)
    dy = make_dy(*size, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        first = run(adaptive_fusion, tensors, dy, backend="triton")
        plain = run(adaptive_fusion, tensors, dy, backend="reference")
        for _ in range(100):
            again = run(adaptive_fusion, tensors, dy, backend="triton")
            assert all(torch.equal(first[name], again[name]) for name in first)
    assert_at_most_twice(first, plain, run_exact(tensors, dy), torch.bfloat16)


# ---- all kinds of input

def gaps(tensor):
    """The same values with other strides: every other channel of a larger tensor."""
    return torch.stack([tensor, -tensor], -1).flatten(-2)[..., ::2]


def transposed(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("change", [gaps, transposed])
def test_inputs_with_gaps(change):
    tensors = make(2, 3, 4, 6, 5)
    changed = [change(v.detach()).requires_grad_() for v in tensors]
    assert not changed[0].is_contiguous()
    dy = torch.randn(5, 3, 4, dtype=torch.float64, device=DEVICE).permute(1, 2, 0)
    ours = run(adaptive_fusion, changed, dy, backend="triton")
    exact = run(adaptive_fusion, tensors, dy, backend="reference")
    for name in exact:
        assert_close(name, ours[name], exact[name], 1e-12)


@pytest.mark.parametrize("strides", [(2**30, 12, 4, 1), (12, 2**30, 4, 1), (12, 4, 2**30, 1)], ids="KBT")
def test_rows_more_than_2_31_values_apart(strides):
    """Untouched memory costs nothing: 4 GiB are allocated, a few pages are used."""
    x, *rest = make(3, 3, 3, 4, 3, torch.float16)
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided(x.shape, strides)
    far.copy_(x.detach())
    dy = make_dy(3, 3, 3, 4, 3, torch.float16)
    near = run(adaptive_fusion, [x, *rest], dy, backend="triton")
    found = run(adaptive_fusion, [far.requires_grad_(), *rest], dy, backend="triton")
    assert all(torch.equal(near[name], found[name]) for name in near)


def test_a_slice_of_longer_weights_is_read_in_place():
    """The model has adaptive weights for 77 positions and slices them to the longest expression."""
    x, w, *rest = make(2, 3, 4, 6, 5)
    long = torch.cat([w, torch.full_like(w, 9.0)], 1).detach().requires_grad_()
    y = adaptive_fusion(x, long[:, :4], *rest, backend="triton")
    assert_close("output", y, adaptive_fusion_reference(x, w, *rest), 1e-12)
    gradient, = torch.autograd.grad(y.sum(), long)
    assert gradient[:, 4:].abs().max() == 0 and gradient[:, :4].abs().max() > 0


@pytest.mark.parametrize("B, T", [(0, 3), (2, 0)])
def test_an_empty_batch(B, T):
    tensors = make(2, B, T, 5, 4)
    found = run(adaptive_fusion, tensors, make_dy(2, B, T, 5, 4), backend="triton")
    assert found["output"].shape == (B, T, 4)
    for name, v in zip(NAMES, tensors):
        assert found[name].shape == v.shape and not found[name].any(), name


def test_tf32_allowed_under_its_newer_name():
    """Once a program has used that name, reading the older one raises."""
    tensors = make(1, 2, 3, 4, 5, torch.float32)
    first = adaptive_fusion(*tensors, backend="triton")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert_close("output", adaptive_fusion(*tensors, backend="triton"), first, 1e-2)
    finally:
        matmul.fp32_precision = before
    assert not matmul.allow_tf32


# ---- what is launched

def launches_of(monkeypatch, name):
    """The options of each launch of a kernel from now on."""
    kernel = getattr(fusion_triton, name)
    launched = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(options) or kernel[grid](*args, **options)

    monkeypatch.setattr(fusion_triton, name, Spy())
    return launched


@pytest.mark.parametrize("needed", range(6), ids=NAMES)
def test_only_needed_gradients_are_computed(needed, monkeypatch):
    size = (2, 2, 3, 5, 4)
    tensors = make(*size)
    for i, v in enumerate(tensors):
        v.requires_grad_(i == needed)
    launched = launches_of(monkeypatch, "gradients_kernel")
    ours = run(adaptive_fusion, tensors, make_dy(*size), backend="triton")
    exact = run(adaptive_fusion_reference, tensors, make_dy(*size))
    assert_close(NAMES[needed], ours[NAMES[needed]], exact[NAMES[needed]], 1e-12)
    asked = [flag for options in launched for flag in options if flag.startswith("NEED") and options[flag]]
    assert asked == [["NEED_X"], ["NEED_W"], ["NEED_P"], [], ["NEED_G"], ["NEED_C"]][needed]
    assert len(launched) == (needed != 3)  # the gradient of p needs no kernel


def test_torch_compile_computes_the_statistics_of_two_bridges_once(monkeypatch):
    x, *first = make(2, 2, 3, 16, 8, torch.float32)
    _, *second = make(2, 2, 3, 16, 8, torch.float32, seed=1)

    def bridges(x):
        return adaptive_fusion(x, *first, backend="triton") + adaptive_fusion(x, *second, backend="triton")

    expected = bridges(x)
    gradient, = torch.autograd.grad(expected.sum(), x)
    launched = launches_of(monkeypatch, "statistics_kernel")
    torch.compiler.reset()
    found = torch.compile(bridges, backend="aot_eager_decomp_partition", fullgraph=True)(x)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], gradient)
    assert len(launched) == 1


def test_the_model_with_the_kernel_compiles_in_one_piece(monkeypatch):
    """Under autocast, as in training on a GPU."""
    monkeypatch.setattr(fusion, "choose_backend", lambda _: "triton")
    model = make_hivg(stage=1, dtype=torch.float32).to(DEVICE)
    batch = [v.to(DEVICE) for v in make_batch(["man", "red cup"], dtype=torch.float32)]
    launched = launches_of(monkeypatch, "forward_kernel")
    torch.compiler.reset()
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = model(*batch)
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(*batch)
    assert len(launched) == 2 * len(model.bridges)
    assert_close("boxes", found.boxes, plain.boxes, 0.01)


@NORM
def test_fake_implementations_have_the_shapes_of_the_real_ones(norm):
    x, w, P, p, *gc = make(2, 2, 3, 5, 4, norm=norm)
    g, c = gc or (None, None)
    mean = rstd = None
    if norm:
        torch.library.opcheck(fusion_triton.statistics, (x.detach(), 1e-5))
        mean, rstd = fusion_triton.statistics(x.detach(), 1e-5)
    torch.library.opcheck(fusion_triton.forward, (x, mean, rstd, w, P, p, g, c))


def test_training_with_the_kernel_gives_the_same_losses(monkeypatch):
    """In float64: in float32 rounding may decide on which side of zero a ReLU's input falls, and after 20 steps two
    equivalent computations differ by 1e-2."""
    batch = make_training_batch(["man", "red cup"], torch.float64)
    batch = {name: v.to(DEVICE) for name, v in batch.items()}
    calls = calls_of(monkeypatch, fusion_triton, "adaptive_fusion")
    losses = {}
    for backend in ("reference", "triton"):
        monkeypatch.setattr(fusion, "choose_backend", lambda _, backend=backend: backend)
        model = make_hivg(stage=1).to(DEVICE)  # in evaluation mode: no dropout
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses[backend] = []
        for _ in range(4):
            terms = terms_of(model, batch)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            losses[backend].append({name: v.item() for name, v in terms.items()})
    assert len(calls) == 4 * 2  # steps, bridges
    assert losses["reference"][0] != losses["reference"][-1]
    for ours, plain in zip(losses["triton"], losses["reference"]):
        for name in plain:
            assert ours[name] == pytest.approx(plain[name], rel=1e-6, abs=1e-6), name


def test_counted_bytes_and_operations():
    """The figures in the module's docstring."""
    assert fusion_triton.count() == {"operations": 46_506_442_752, "x": 60_555_264, "w": 946_176, "P": 9_437_184,
                                     "y": 7_569_408}
    text = Path(fusion_triton.__file__).read_text()
    assert all(words in text for words in ("46.5 GFLOP", "60.6 MB", "9.4 MB", "0.9 MB", "7.6 MB"))
