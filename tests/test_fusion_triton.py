"""The Triton kernels: forward and every gradient against the float64 reference, by the interpreter where there is no
GPU; the training with them forced."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from makers import assert_close

import train
from hivg import fusion
from hivg.fusion import adaptive_fusion, adaptive_fusion_reference

triton = pytest.importorskip("triton")
from hivg import fusion_triton  # noqa: E402  after the check that Triton is there

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["text_states", "adaptive_weights", "proj_weight", "proj_bias", "norm_weight", "norm_bias"]
SIZES = {  # K, B, T, D_t, D_v
    "ones": (1, 1, 1, 1, 1),
    "primes": (3, 5, 7, 13, 11),
    "no power of two": (2, 3, 6, 24, 40),
    "larger than a block": (2, 2, 35, 70, 130),
    "blocks filled": (1, 4, 16, 64, 128),
    "twelve layers": (12, 1, 5, 8, 6),
}


def make(K, B, T, D, DV, dtype=torch.float64, norm=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)

    tensors = [2 * random(K, B, T, D) + 3, random(K, T, D, scale=0.5), random(DV, K * D, scale=(K * D) ** -0.5),
               random(DV), 1 + random(K, D, scale=0.3), random(K, D, scale=0.3)]
    return [v.requires_grad_() for v in tensors[: 6 if norm else 4]]


def run(f, tensors, dy, **options):
    """-> output and gradients, by name."""
    tensors = [v.detach().requires_grad_(v.requires_grad) for v in tensors]
    y = f(*tensors, **options)
    wanted = [v for v in tensors if v.requires_grad]
    grads = torch.autograd.grad(y, wanted, dy.to(y.dtype))
    return {"output": y} | {n: g for n, g in zip([n for n, v in zip(NAMES, tensors) if v.requires_grad], grads)}


def errors(found, exact):
    return {name: ((found[name].double() - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-30)).item()
            for name in exact}


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("size", SIZES)
def test_float64_is_exact(size, norm):
    tensors = make(*SIZES[size], norm=norm)
    if size == "ones" and norm:
        tensors[0].requires_grad_(False)  # a row of one channel is its own mean: no gradient to compare
    dy = torch.randn(SIZES[size][1], SIZES[size][2], SIZES[size][4], dtype=torch.float64, device=DEVICE)
    ours, exact = run(adaptive_fusion, tensors, dy, backend="triton"), run(adaptive_fusion_reference, tensors, dy)
    assert ours.keys() == exact.keys()
    for name in exact:
        assert_close(name, ours[name], exact[name], 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("size", ["primes", "no power of two", "larger than a block"])
def test_error_is_at_most_twice_plain_pytorchs(size, norm, dtype):
    tensors = make(*SIZES[size], dtype, norm)
    _, B, T, _, DV = SIZES[size]
    dy = torch.randn(B, T, DV, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    exact = run(adaptive_fusion_reference, [v.detach().double().requires_grad_() for v in tensors], dy.double())
    ours, plain = (errors(run(adaptive_fusion, tensors, dy, backend=b), exact) for b in ("triton", "reference"))
    for name in exact:  # on few numbers plain PyTorch can be exact by luck: half a unit of rounding is allowed to all
        assert ours[name] <= 2 * plain[name] + torch.finfo(dtype).eps / 2, (name, ours[name], plain[name])


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_gradcheck(norm):
    tensors = make(2, 2, 3, 5, 4, norm=norm)
    assert torch.autograd.gradcheck(lambda *t: adaptive_fusion(*t, backend="triton"), tensors)


def gaps(tensor):
    """The same numbers with other strides: every second row and channel of a larger tensor."""
    return torch.stack([tensor, -tensor], -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("change", [gaps, lambda v: v.transpose(0, -1).contiguous().transpose(0, -1)])
def test_inputs_with_gaps(change):
    tensors = make(2, 3, 4, 6, 5)
    changed = [change(v.detach()).requires_grad_() for v in tensors]
    assert not changed[0].is_contiguous()
    dy = torch.randn(5, 3, 4, dtype=torch.float64, device=DEVICE).permute(1, 2, 0)
    ours, exact = (run(adaptive_fusion, t, dy, backend=b) for t, b in ((changed, "triton"), (tensors, "reference")))
    for name in exact:
        assert_close(name, ours[name], exact[name], 1e-12)


def test_a_slice_of_longer_weights_is_read_in_place():
    """The model keeps 77 positions of adaptive weights and cuts them to the longest expression."""
    x, w, *rest = make(2, 3, 4, 6, 5)
    long = torch.cat([w, torch.full_like(w, 9.0)], 1).detach().requires_grad_()
    y = adaptive_fusion(x, long[:, :4], *rest, backend="triton")
    assert_close("output", y, adaptive_fusion_reference(x, w, *rest), 1e-12)
    gradient, = torch.autograd.grad(y.sum(), long)
    assert gradient[:, 4:].abs().max() == 0 and gradient[:, :4].abs().max() > 0


@pytest.mark.parametrize("needed", range(6))
def test_only_what_is_asked_for_is_computed(needed, monkeypatch):
    tensors = make(2, 2, 3, 5, 4)
    for i, v in enumerate(tensors):
        v.requires_grad_(i == needed)
    launched, asked = [], {}
    for name in ("statistics_kernel", "proj_kernel", "weights_kernel", "states_kernel"):
        kernel = getattr(fusion_triton, name)
        monkeypatch.setattr(fusion_triton, name, Spy(kernel, name, launched, asked))
    dy = torch.randn(2, 3, 4, dtype=torch.float64, device=DEVICE)
    ours, exact = run(adaptive_fusion, tensors, dy, backend="triton"), run(adaptive_fusion_reference, tensors, dy)
    assert_close(NAMES[needed], ours[NAMES[needed]], exact[NAMES[needed]], 1e-12)
    assert launched == {0: ["statistics_kernel", "states_kernel"], 2: ["statistics_kernel", "proj_kernel"], 3: []}.get(
        needed, ["statistics_kernel", "weights_kernel"])
    sums = {"w": needed == 1, "g": needed == 4, "c": needed == 5}
    assert asked == {f"NEED_{name.upper()}": need for name, need in sums.items()} if any(sums.values()) else not asked


class Spy:
    def __init__(self, kernel, name, launched, asked):
        self.kernel, self.name, self.launched, self.asked = kernel, name, launched, asked

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launched.append(self.name)
            self.asked.update({k: v for k, v in options.items() if k.startswith("NEED")})
            self.kernel[grid](*args, **options)

        return launch


def test_the_same_bits_twice():
    tensors = make(*SIZES["larger than a block"], torch.float32)
    dy = torch.randn(2, 35, 130, device=DEVICE)
    first = run(adaptive_fusion, tensors, dy, backend="triton")
    for _ in range(100 if DEVICE == "cuda" else 1):
        again = run(adaptive_fusion, tensors, dy, backend="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_large_means_lose_no_digits():
    """Rows around 1,000 with a spread of 1: the sum of squares alone would lose the spread in float32."""
    x, *rest = make(1, 2, 3, 200, 8, torch.float32)
    x = (x.detach() + 1000).requires_grad_()
    exact = adaptive_fusion_reference(*(v.double() for v in (x, *rest)))
    assert_close("output", adaptive_fusion(x, *rest, backend="triton"), exact.float(), 2e-3)


def test_an_empty_batch():
    y = adaptive_fusion(*make(2, 0, 3, 5, 4), backend="triton")
    assert y.shape == (0, 3, 4)


def test_fake_implementation_has_the_shapes_of_the_real_one():
    tensors = make(2, 2, 3, 5, 4)
    torch.library.opcheck(fusion_triton.forward, (*tensors, 1e-5))


def test_autocast_makes_the_product_in_its_type():
    tensors = make(2, 2, 3, 16, 8, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, plain = (adaptive_fusion(*tensors, backend=b) for b in ("triton", "reference"))
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert_close("output", ours.float(), plain.float(), 0.05)
    assert torch.autograd.grad(ours.float().sum(), tensors[2])[0].dtype == torch.float32


def test_chosen_once_in_one_place():
    assert fusion.choose_backend("cpu") == "reference" and fusion.choose_backend("cuda") == "triton"
    with pytest.raises(ValueError, match="auto, reference or triton"):
        adaptive_fusion(*make(1, 1, 1, 2, 2), backend="cuda")


def test_training_with_the_kernel_gives_the_same_losses(tmp_path, clip_file, monkeypatch):
    """In float64: in float32 a ReLU may stand so near to its kink that rounding decides, and in 20 steps two ways to
    compute the same are 1e-2 apart."""
    begin_stage, to_device = train.begin_stage, train.to_device

    def begin_in_float64(*args):
        model, best = begin_stage(*args)
        return model.double(), best

    def in_float64(*args):
        batch = to_device(*args)
        return batch | {"images": batch["images"].double()}

    monkeypatch.setattr(train, "begin_stage", begin_in_float64)
    monkeypatch.setattr(train, "to_device", in_float64)
    s = train.Settings(clip=str(clip_file), epoch_samples=40, batch_size=4, epochs=(1, 1), warmup_steps=2, workers=0,
                       lora="vanilla", lr=(1e-3, 1e-3), device="cpu", dtype="float32", save_minutes=1000)
    monkeypatch.setattr(train, "validate", lambda *_: {"accuracy": 0.5, "mean_iou": 0.5})
    monkeypatch.chdir(tmp_path)
    calls = []
    fused = fusion_triton.adaptive_fusion
    monkeypatch.setattr(fusion_triton, "adaptive_fusion", lambda *args: calls.append(1) or fused(*args))
    log_step, losses = train.Log.step, {}
    for backend in ("reference", "triton"):
        monkeypatch.setattr(fusion, "choose_backend", lambda _, backend=backend: backend)
        monkeypatch.setattr(train.Log, "step", lambda self, stage, step, steps, lr, values, backend=backend: (
            losses.setdefault(backend, []).append({k: v.item() for k, v in values.items()}),
            log_step(self, stage, step, steps, lr, values)))
        train.train(replace(s, name=backend))
    assert len(calls) == 20 * 3  # steps, bridges
    assert len(losses["triton"]) == len(losses["reference"]) == 20
    for ours, plain in zip(losses["triton"], losses["reference"]):
        for name in plain:
            assert ours[name] == pytest.approx(plain[name], rel=1e-6, abs=1e-6), name


def test_counted_bytes_and_operations():
    """The figures of the module's opening."""
    assert fusion_triton.count() == {"operations": 46_506_442_752, "x": 60_555_264, "w": 946_176, "P": 9_437_184,
                                     "y": 7_569_408}
    text = Path(fusion_triton.__file__).read_text()
    assert all(words in text for words in ("46.5 GFLOP", "60.6 MB", "9.4 MB", "0.9 MB", "7.6 MB"))
