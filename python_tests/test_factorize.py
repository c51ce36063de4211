"""Truncated SVD by blocks: against torch's, in both ways, of all kinds of matrices, in little memory."""

import functools
import importlib
import itertools
import os
import subprocess
import sys
import types

import numpy
import pytest
import torch

from urm_kernels.factorize import Factorization, factorize
from urm_kernels.testing import data

module = importlib.import_module("urm_kernels.factorize")
WAYS = ["gram", "krylov"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Solvers of small matrices wait for their threads longer than they work, on busy machines by orders."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Either way to the singular vectors, whatever d is."""
    if request.param == "krylov":
        monkeypatch.setattr(module, "_READING", -(10**6))
    return request.param


def matrix(kind, rows=600, d=90):
    W = torch.randn(rows, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if kind == "decay":
        W *= torch.arange(1, d + 1) ** -1.0
    if kind == "deficient":
        W = W[:, :5] @ torch.randn(5, d, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return W


def svd(W, rank):
    """(best approximation of the rank, share of the energy) by torch, in float64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    kept = S[:rank].square().sum() / S.square().sum()
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], float(kept), S


def check(W, rank, **options):
    found = factorize(W, rank, **options)
    best, kept, S = svd(W, rank)
    scale = float(W.double().abs().max())
    assert isinstance(found, Factorization) and found.factors.dtype == found.projection.dtype == torch.float32
    assert found.factors.shape == (len(W), rank) and found.projection.shape == (W.shape[1], rank)
    assert found.energy_kept == pytest.approx(kept, rel=1e-9) and found.energy_kept <= 1
    assert torch.allclose(found.factors.double() @ found.projection.double().T, best, atol=2e-5 * scale, rtol=0)
    return found, S


@pytest.mark.parametrize("shape", [(600, 90), (90, 90), (40, 90), (300, 3), (1, 20)])
@pytest.mark.parametrize("kind", ["iid", "decay", "deficient"])
def test_equals_the_svd(way, kind, shape):
    if kind == "deficient" and shape[1] < 5:
        pytest.skip("of full rank")
    W, rank = matrix(kind, *shape), min(3, shape[1])
    found, S = check(W, rank)
    P = found.projection.double()
    assert torch.allclose(P.T @ P, torch.eye(rank, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.factors.double(), W @ P, atol=1e-5)
    if shape[0] > 1:
        assert torch.allclose(found.factors.double().norm(dim=0), S[:rank], rtol=1e-6)
    assert (P.gather(0, P.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("rank", [1, 5, 60, 90])
def test_ranks_beyond_the_matrix_own(way, rank):
    for W in (matrix("deficient"), matrix("iid", 7, 90), torch.zeros(9, 90), torch.zeros(0, 90)):
        found = factorize(W, rank)
        P = found.projection.double()
        assert torch.allclose(P.T @ P, torch.eye(rank, dtype=torch.float64), atol=1e-6)
        assert found.factors.isfinite().all()
        if rank >= 7 or not W.any():
            assert found.energy_kept == pytest.approx(1, abs=1e-12)
            assert torch.allclose(found.factors.double() @ P.T, W.double(), atol=2e-5)


def test_repeated_singular_values(way):
    # Any directions of the space are right ones: which come is free, the energy is not.
    W = torch.linalg.qr(matrix("iid")).Q
    found = factorize(W, 9)
    assert found.energy_kept == pytest.approx(9 / 90, rel=1e-9)
    assert torch.allclose(found.factors.T @ found.factors, torch.eye(9), atol=1e-5)


def test_on_a_device(device, way):
    W = matrix("decay").float()
    here, there = factorize(W, 7), factorize(W.to(device), 7)
    assert there.factors.device.type == there.projection.device.type == device.type
    assert torch.allclose(there.factors.cpu(), here.factors, atol=1e-5)
    assert there.energy_kept == pytest.approx(here.energy_kept, rel=1e-9)


def test_noise_is_found_nearly_and_what_has_structure_well():
    for kind, share in (("iid", 2e-2), ("decay", 1e-6)):
        W = matrix(kind, 800, 300).float()
        with pytest.MonkeyPatch.context() as patch:
            best = factorize(W, 8).energy_kept
            patch.setattr(module, "_READING", -(10**6))
            found = factorize(W, 8)
        assert best * (1 - share) < found.energy_kept <= best * (1 + 1e-12)
        kept = found.factors.double().square().sum() / W.double().square().sum()
        assert found.energy_kept == pytest.approx(float(kept), rel=1e-6)


def test_more_columns_and_passes_keep_more(monkeypatch):
    monkeypatch.setattr(module, "_READING", -(10**6))
    W = matrix("iid", 800, 300)
    steps = [(0, 1), (8, 1), (8, 3), (32, 3), (32, 9)]
    kept = [factorize(W, 8, oversample=more, power_iterations=passes).energy_kept for more, passes in steps]
    assert all(before * 1.001 < after for before, after in itertools.pairwise(kept))
    assert kept[-1] == pytest.approx(svd(W, 8)[1], rel=1e-9)


def test_the_line_between_the_ways(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "_gram", lambda blocks: asked.append("gram") or (blocks.zeros(), torch.eye(4000)))
    monkeypatch.setattr(module, "_krylov", lambda *_: asked.append("krylov") or (torch.zeros(()), torch.eye(4000)))
    monkeypatch.setattr(module, "_project", lambda *_: None)
    for d in (6 * (256 + 2 * 80), 6 * (256 + 2 * 80) + 1):
        factorize(torch.zeros(2, d), 64)
    assert asked == WAYS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_strides(way, dtype):
    W = matrix("decay").to(dtype)
    found, _ = check(W, 7)
    wide = torch.zeros(600, 270, dtype=dtype)
    wide[:, ::3] = W
    for strided in (W.T.contiguous().T, wide[:, ::3], W.flip(0).contiguous().flip(0)):
        again = factorize(strided, 7)
        assert torch.allclose(again.factors, found.factors, atol=1e-5)
        assert again.energy_kept == pytest.approx(found.energy_kept, rel=1e-12)
    row = W[:1].expand(50, 90)
    assert factorize(row, 1).energy_kept == pytest.approx(1, rel=1e-12)


def test_half_precision_does_not_overflow(way):
    W = torch.full((100, 40), 65504.0, dtype=torch.float16)
    found = factorize(W, 1)
    assert torch.allclose(found.factors @ found.projection.T, W.float(), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 2.0**-60, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_changes_nothing(way, scale, dtype):
    W = matrix("decay").to(dtype)
    one, other = factorize(W, 7), factorize(W * scale, 7)
    assert torch.allclose(one.projection, other.projection, atol=1e-5)
    assert torch.allclose(one.factors, other.factors.div(scale), atol=1e-5)
    assert one.energy_kept == pytest.approx(other.energy_kept, rel=1e-6)


def test_seed_decides_and_torch_generator_has_no_say(way):
    W = matrix("iid", 300, 200).bfloat16().requires_grad_()
    state = torch.get_rng_state()
    one, two, other = factorize(W, 4, seed=3), factorize(W, 4, seed=3), factorize(W, 4, seed=4)
    assert torch.equal(torch.get_rng_state(), state) and not one.factors.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(one[:2], two[:2], strict=True)) and one.energy_kept == two.energy_kept
    assert torch.equal(one.factors, other.factors) == (way == "gram")


@pytest.mark.parametrize("rows", [1, 7, 599, 600, 601])
def test_blocks_change_nothing(way, monkeypatch, rows):
    W = matrix("decay").float()
    whole = factorize(W, 7)
    monkeypatch.setattr(module, "_BLOCK_BYTES", rows * 8 * 90)
    found = factorize(W, 7)
    assert torch.allclose(found.factors, whole.factors, atol=1e-5)
    assert found.energy_kept == pytest.approx(whole.energy_kept, rel=1e-12)


@pytest.mark.parametrize("kind", ["iid", "decay", "deficient"])
def test_whitening_changes_scales_alone(way, monkeypatch, kind):
    W = matrix(kind).float()
    monkeypatch.setattr(module, "_BLOCK_BYTES", 77 * 8 * 90)
    plain, white = factorize(W, 7), factorize(W, 7, whiten=True)
    real = 5 if kind == "deficient" else 7
    squares = white.factors.double().square().mean(0)
    assert torch.allclose(squares[:real], torch.ones(real, dtype=torch.float64), rtol=1e-6)
    assert torch.allclose(squares[real:], torch.zeros(7 - real, dtype=torch.float64), atol=1e-10)
    assert white.energy_kept == plain.energy_kept
    scale = plain.factors.double().square().mean(0).sqrt()[:real]
    assert torch.allclose(white.projection[:, :real].double(), plain.projection[:, :real] * scale, atol=1e-6)
    hidden = torch.randn(20, 90)
    assert torch.allclose((hidden @ white.projection) @ white.factors.T, (hidden @ plain.projection) @ plain.factors.T,
                          atol=1e-4)  # fmt: skip
    assert torch.equal(factorize(torch.zeros(0, 5), 2, whiten=True).projection, factorize(torch.zeros(0, 5), 2)[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_refuses_what_is_not_finite(way, bad, dtype):
    W = matrix("iid").to(dtype)
    W[599, 89] = bad
    with pytest.raises(ValueError, match="W: finite values are wanted"):
        factorize(W, 2)


@pytest.mark.parametrize("value", [1e-50, 1e-37, 1e31, 1e39, 1e161])
def test_refuses_factors_outside_float32(way, value):
    W = torch.full((20, 30), value, dtype=torch.float64)
    if 1e-38 < value < 1e38:
        assert torch.allclose(factorize(W, 1).factors.double(), torch.tensor(value * 30**0.5).double(), rtol=1e-6)
        return
    with pytest.raises(ValueError, match=r"W: (factors within float32's range|finite values)"):
        factorize(W, 1)


@pytest.mark.parametrize(
    ("error", "words", "arguments", "options"),
    [
        (TypeError, "W: a torch.Tensor is wanted, list", ([[1.0]], 1), {}),
        (TypeError, "W: dtype float32, .* wanted, torch.int64 came", (torch.ones(3, 2, dtype=torch.int64), 1), {}),
        (
            TypeError,
            "W: dtype float32, .* wanted, torch.complex64 came",
            (torch.ones(3, 2, dtype=torch.complex64), 1),
            {},
        ),
        (TypeError, "W: a dense", (torch.ones(3, 2).to_sparse(), 1), {}),
        (ValueError, r"W: shape \[N, d\] is wanted, \[3\] came", (torch.ones(3), 1), {}),
        (ValueError, "rank: from 1 to d = 2 is wanted, 3 came", (torch.ones(3, 2), 3), {}),
        (ValueError, "rank: from 1 to d = 2 is wanted, 0 came", (torch.ones(3, 2), 0), {}),
        (ValueError, "rank: from 1 to d = 0", (torch.ones(3, 0), 1), {}),
        (TypeError, "rank: an integer is wanted, 1.5", (torch.ones(3, 2), 1.5), {}),
        (ValueError, "seed: an integer from 0", (torch.ones(3, 2), 1), {"seed": -1}),
        (TypeError, "whiten: True or False", (torch.ones(3, 2), 1), {"whiten": 1}),
        (TypeError, "oversample: an integer is wanted", (torch.ones(3, 2), 1), {"oversample": None}),
        (ValueError, "oversample: an integer from 0", (torch.ones(3, 2), 1), {"oversample": -1}),
        (ValueError, "power_iterations: an integer from 1 is", (torch.ones(3, 2), 1), {"power_iterations": 0}),
        (TypeError, "progress: a function of two integers or None", (torch.ones(3, 2), 1), {"progress": True}),
    ],
)
def test_refuses_in_words(error, words, arguments, options):
    with pytest.raises(error, match=words):
        factorize(*arguments, **options)


def test_arrays_and_memory_maps(way, tmp_path, capfd):
    W = matrix("decay").float()
    numpy.save(tmp_path / "W.npy", W.numpy())
    found = factorize(W, 7)
    for array in (W.numpy(), numpy.load(tmp_path / "W.npy", mmap_mode="r")):
        assert torch.allclose(factorize(array, 7).factors, found.factors, atol=1e-6)
    assert capfd.readouterr() == ("", "")


def test_progress_counts_every_block(way, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 50 * 8 * 90)
    steps = []
    factorize(matrix("decay"), 4, progress=lambda *step: steps.append(step))
    reads = 2 if way == "gram" else 6  # five passes of twenty columns span all 90
    assert steps == [(done, reads * 12) for done in range(1, reads * 12 + 1)]
    with pytest.raises(ZeroDivisionError):
        factorize(matrix("decay"), 4, progress=lambda *_: 1 / 0)


def test_a_bar_is_asked_for_after_two_seconds_on_a_terminal(way, monkeypatch):
    class Bar:
        def __init__(self, total, delay, leave, disable, **words):
            self.total, self.done, self.closed = total, 0, False
            assert delay == 2 and not leave and disable is None
            bars.append(self)

        def update(self):
            self.done += 1

        def close(self):
            self.closed = True

    bars = []
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    monkeypatch.setattr(module, "_BLOCK_BYTES", 50 * 8 * 90)
    factorize(matrix("decay"), 4, progress=lambda *_: None)
    assert not bars
    factorize(matrix("decay"), 4)
    with pytest.raises(ValueError, match="finite"):
        factorize(torch.full((60, 90), torch.nan), 4)
    assert bars[0].done == bars[0].total > 2 and [bar.closed for bar in bars] == [True, True]
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    factorize(matrix("decay"), 4)
    assert len(bars) == 2


MEASURED = """
import sys, threading, time, numpy, torch
torch.set_num_threads(int(sys.argv[5]))
from urm_kernels.factorize import factorize
path, rows, d, rank = sys.argv[1], *map(int, sys.argv[2:5])
def anonymous():
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon")), 0)
factorize(torch.randn(5000, d), rank)  # threads and libraries get what they keep
peak, done = [anonymous()], threading.Event()
before = peak[0]
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
found = factorize(numpy.memmap(path, numpy.float32, "r", shape=(rows, d)), rank)
seconds = time.perf_counter() - start
done.set()
thread.join()
print(before, max(peak[0], anonymous()), seconds, found.energy_kept)
"""


def measured(path, rows, d, rank, threads):
    """(anonymous bytes before, their peak, seconds, energy) of a memory-mapped float32 matrix, in a fresh process.

    Zeros without room on the disk, but for 5 stretches of random rows.
    """
    if not os.path.exists("/proc/self/status"):
        pytest.skip("this system does not tell a process its anonymous memory")
    with open(path, "wb") as file:
        file.truncate(rows * d * 4)
        for at in range(0, rows, rows // 5):
            file.seek(at * d * 4)
            file.write(torch.randn(1000, d).numpy().tobytes())
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, path, *map(str, (rows, d, rank, threads))],
        capture_output=True,
        text=True,
        check=False,
    )
    path.unlink()
    assert done.returncode == 0, done.stderr
    before, peak, seconds, energy = map(float, done.stdout.split())
    if not before:
        pytest.skip("this system does not tell a process its anonymous memory")
    return before, peak, seconds, energy


def test_memory_is_a_block_and_the_result(tmp_path):
    rows, d, rank = 400_000, 256, 16
    before, peak, _, energy = measured(tmp_path / "W", rows, d, rank, threads=1)
    assert peak - before < rows * rank * 4 + (160 << 20) < rows * d * 4 / 2
    assert rank / d < energy < 3 * rank / d


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2_000_000, 10_000_000])
def test_ten_million_rows_in_four_gigabytes(tmp_path, rows):
    before, peak, seconds, energy = measured(tmp_path / "W", rows, 768, 64, threads=os.cpu_count() or 1)
    print(f"{rows} rows: {before / 2**20:.0f} MiB before, {peak / 2**20:.0f} MiB at most, {seconds:.0f} s, {energy=}")
    assert peak < min(4 << 30, rows * 64 * 4 + (800 << 20))


@functools.cache
def vocabulary(kind):
    """(float32 rows, their energies by direction, the directions): the SVD's, exactly, in less time."""
    W = data._embeddings(kind)
    energies, basis = torch.linalg.eigh(W.T @ W)
    return W.float(), energies.flip(0), basis.flip(1)


@pytest.mark.parametrize("rank", [64, 128])
@pytest.mark.parametrize("kind", ["smollm2", "minilm"])
def test_real_vocabularies(way, kind, rank):
    try:
        W, energies, basis = vocabulary(kind)
    except ValueError as error:
        pytest.skip(str(error))
    found = factorize(W, rank)
    kept = float(energies[:rank].sum() / energies.sum())
    assert found.energy_kept == pytest.approx(kept, rel=1e-3)

    hidden = data.make_queries(kind, 40, 1, W.shape[1], 0, W)[:, 0]
    scores = (hidden @ found.projection) @ found.factors.T
    wanted = (hidden.double() @ basis[:, :rank]) @ (W.double() @ basis[:, :rank]).T
    top, best = scores.topk(10), wanted.topk(10)
    assert torch.allclose(top.values.double(), best.values, rtol=1e-5 if way == "gram" else 1e-3)
    shared = [len(set(a) & set(b)) for a, b in zip(top.indices.tolist(), best.indices.tolist(), strict=True)]
    assert sum(shared) >= 0.995 * 400  # all but ties within rounding; 400 of 400 when this was written
