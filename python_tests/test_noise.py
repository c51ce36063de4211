"""Philox and the Gumbel noise: known answers, the same bits everywhere, accuracy, and the law of its draws."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_compiled_cuda import _nvrtc

from urm_kernels.backends import noise
from urm_kernels.backends.cuda import launching

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Random123's kat_vectors: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
PROGRAM = """
#include "common/gumbel.h"
extern "C" void philox_words(const uint32_t* c, uint32_t k0, uint32_t k1, uint32_t* out) {
  const urm::PhiloxWords words = urm::philox4x32({{c[0], c[1], c[2], c[3]}}, k0, k1);
  for (int i = 0; i < 4; ++i) out[i] = words.word[i];
}
extern "C" void noise(uint64_t seed, const uint64_t* streams, const uint64_t* rows, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = urm::gumbel_noise(seed, streams[i], rows[i]);
}
extern "C" void gumbel(const uint64_t* bits, int64_t count, double* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = urm::gumbel_of(urm::open_uniform(bits[i]));
}
extern "C" void perturbed(const float* scores, float t, uint64_t seed, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = urm::perturbed_score(scores[i], t, seed, 5, uint64_t(i));
}
"""


@pytest.fixture(scope="module", params=["-O0", "-O3", "-O3 -march=native"])
def compiled(request, tmp_path_factory):
    """csrc/common by the host's compiler, with and without fused instructions within its reach."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("noise")
    (folder / "noise.cc").write_text(PROGRAM)
    flags = [*request.param.split(), "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, "noise.cc", "-o", "noise.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "noise.so"))


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def in_cpp(library, name, *arguments):
    """float32 (float64 of `gumbel`) [count], from a function that takes its last argument's size and an address."""
    count = len(arguments[-1])
    out = torch.empty(count, dtype=torch.float64 if name == "gumbel" else torch.float32)
    given = [address(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(library, name)(*given, ctypes.c_int64(count), address(out))
    return out


def same_bits(a, b):
    kind = torch.int64 if a.dtype == torch.float64 else torch.int32
    return torch.equal(a.view(kind), b.view(kind))


def hard_words():
    """64 random bits, int64: the smallest and largest, around powers of two and the seams, and many others."""
    edges = [0, 1, 2, -1, -2, -(2**11), 2**63 - 1, -(2**63), -(2**63) + 1]
    for power in range(1, 63):
        edges += [2**power - 1, 2**power, 2**power + 1, -(2**power), -(2**power) - 1]
    # v around the seam of log1p, and where -log(1 - v) is 1, so that the outer logarithm is about zero.
    for v in (noise.DIRECT_LOG1P, 1 - np.exp(-1.0)):
        middle = int(v * 2.0**64)
        edges += [middle + step - (middle + step >= 2**63) * 2**64 for step in range(-5000, 5000, 100)]
    random = torch.Generator().manual_seed(1)
    plenty = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=random)
    small = plenty[:5000] >> torch.randint(0, 63, (5000,), generator=random)
    return torch.cat([torch.tensor(edges), plenty, small])


def rows_of(bits):
    """Row numbers, other ones than the bits, in the same number."""
    return bits.flip(0) & (2**62 - 1)


def words_of(bits):
    return (bits >> 32) & 0xFFFFFFFF, bits & 0xFFFFFFFF


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_in_plain_torch(counter, key, answer):
    found = noise.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in found) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_in_cpp(compiled, counter, key, answer):
    out = (ctypes.c_uint32 * 4)()
    compiled.philox_words((ctypes.c_uint32 * 4)(*counter), *map(ctypes.c_uint32, key), out)
    assert tuple(out) == answer


@pytest.mark.parametrize("number", [6, 7, 2**40, 2**40 + 1])
def test_two_numbers_share_a_block(number):
    seed, stream = torch.tensor(-123456789012345678), torch.tensor(2**50 + 3)
    halves = [int(x) & 0xFFFFFFFF for x in (number >> 1, number >> 33, stream, stream >> 32, seed, seed >> 32)]
    words = noise.philox4x32(tuple(map(torch.tensor, halves[:4])), tuple(map(torch.tensor, halves[4:])))
    found = noise.random_words(seed, stream, torch.tensor(number))
    assert tuple(map(int, found)) == tuple(int(words[2 * (number % 2) + i]) for i in range(2))


def test_cpp_has_the_bits_of_plain_torch(compiled):
    bits = hard_words()
    assert same_bits(in_cpp(compiled, "gumbel", bits), noise.gumbel_of(noise.open_uniform(*words_of(bits))))
    streams, rows, seed = bits, rows_of(bits), -98765432109876
    wanted = noise.gumbel_noise(torch.tensor(seed), streams, rows)
    assert same_bits(in_cpp(compiled, "noise", ctypes.c_uint64(seed), streams, rows), wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-30])
def test_a_score_is_perturbed_by_one_division_and_one_addition(compiled, temperature):
    scores = torch.cat([torch.randn(500) * 10, torch.tensor([0.0, -0.0, np.inf, -np.inf, 3e38, 1e-45])])
    seed, divisor = torch.tensor(9), torch.tensor(temperature)
    made = noise.gumbel_noise(seed, torch.tensor(5), torch.arange(len(scores)))
    wanted = scores / divisor + made
    assert torch.equal(noise.perturbed_scores(scores, divisor, seed, torch.tensor(5), torch.arange(506)), wanted)
    count, out = ctypes.c_int64(506), torch.empty(506)
    compiled.perturbed(address(scores), ctypes.c_float(temperature), ctypes.c_uint64(9), count, address(out))
    assert same_bits(out, wanted)


def test_logarithms_and_noise_are_as_near_to_exact_as_stated():
    if np.finfo(np.longdouble).nmant < 60:
        pytest.skip("needs a long double of 64 bits")
    v = noise.open_uniform(*words_of(hard_words()))
    assert v.min() == 2.0**-65 and v.max() == 1 - 2.0**-53
    exact = np.log1p(-v.numpy().astype(np.longdouble))

    def worst(found, wanted):
        """In units in the last place of the wanted."""
        return float((np.abs(found.numpy() - wanted) / np.spacing(np.abs(wanted).astype(np.float64))).max())

    assert worst(noise.canonical_log1p_minus(v), exact) <= 4
    positive = torch.cat([-noise.canonical_log1p_minus(v), torch.linspace(0.5, 2, 20_001, dtype=torch.float64)])
    assert worst(noise.canonical_log64(positive), np.log(positive.numpy().astype(np.longdouble))) <= 3
    found, wanted = noise.gumbel_of(v), -np.log(-exact)
    assert float((np.abs(found.numpy() - wanted) / np.maximum(1, np.abs(wanted))).max()) <= 2.0**-50


def test_the_largest_of_equal_items_is_any_of_them():
    """Chi-square of Gumbel-max draws among 16 items, and no word of few bits: among 2**22 rows, all noise of the upper
    half of whose range differs, and the first of two halves of the rows wins half of the time."""
    items, draws = 16, 20_000
    made = noise.gumbel_noise(torch.tensor(3), torch.arange(draws)[:, None], torch.arange(items))
    counts = made.argmax(1).bincount(minlength=items).double()
    assert ((counts - draws / items) ** 2 / (draws / items)).sum() < 37.7  # 99.9 % of chi-square with 15 degrees
    rows = 1 << 22
    large = noise.gumbel_of(
        noise.open_uniform(*noise.random_words(torch.tensor(4), torch.tensor(0), torch.arange(rows)))
    )
    assert len(large.unique()) == rows
    best = large.topk(4000).indices
    assert abs((best < rows // 2).double().mean() - 0.5) < 4 * 0.5 / 4000**0.5
    assert abs(float(large.mean()) - np.euler_gamma) < 5 * 1.2825 / rows**0.5


if INTERPRETED:
    import triton
    import triton.language as tl

    from urm_kernels.backends.triton.call import EXACT
    from urm_kernels.backends.triton.noise import gumbel_noise, gumbel_of

    @triton.jit
    def noise_kernel(of_words, of_rows, seed, first, second, streams, rows, count, C: tl.constexpr):
        at = tl.program_id(0) * C + tl.arange(0, C)
        inside = at < count
        a, b = tl.load(first + at, mask=inside, other=0), tl.load(second + at, mask=inside, other=0)
        tl.store(of_words + at, gumbel_of(a, b), mask=inside)
        stream, row = tl.load(streams + at, mask=inside, other=0), tl.load(rows + at, mask=inside, other=0)
        tl.store(of_rows + at, gumbel_noise(tl.zeros([C], tl.int64) + tl.load(seed), stream, row), mask=inside)


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is not on (TRITON_INTERPRET=1)")
def test_triton_has_the_bits_of_plain_torch():
    bits, seed = hard_words(), torch.tensor(-98765432109876)
    (first, second), rows = words_of(bits), rows_of(bits)
    of_words, of_rows = torch.empty(len(bits)), torch.empty(len(bits))
    noise_kernel[(-(-len(bits) // 4096),)](
        of_words, of_rows, seed, first, second, bits, rows, len(bits), C=4096, **EXACT
    )
    assert same_bits(of_words, noise.gumbel_of(noise.open_uniform(first, second)).float())
    assert same_bits(of_rows, noise.gumbel_noise(seed, bits, rows))


def test_nvcc_fuses_nothing(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc on PATH")
    kernel = "__global__ void use(uint64_t s, float* out) { out[threadIdx.x] = urm::gumbel_noise(s, s, threadIdx.x); }"
    (tmp_path / "use.cu").write_text(f'#include "common/gumbel.h"\n{kernel}\n')
    command = [
        nvcc,
        "-std=c++17",
        "-arch=sm_90",
        "--Werror=all-warnings",
        f"-I{SOURCES}",
        "--ptx",
        "use.cu",
        "-o",
        "use.ptx",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "use.ptx").read_text()
    assert "fma" not in made and "mul.rn.f64" in made and "div.rn.f64" in made


def test_nvrtc_takes_the_noise():
    nvrtc = _nvrtc()
    if nvrtc is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    code = """#include "common/gumbel.h"
    extern "C" __global__ void use(uint64_t s, float* out) { *out = urm::perturbed_score(*out, 2.0f, s, s, s); }"""
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"use.cu", 0, None, None) == 0
    options = [*launching.options(launching.sources()), "--gpu-architecture=compute_80"]
    result = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))
    )
    assert result == 0
