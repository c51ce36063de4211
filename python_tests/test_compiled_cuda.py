"""The CUDA kernels as nvcc and NVRTC leave them, without a GPU: no spills, integer tensor cores, 16-byte loads."""

import ctypes
import functools
import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import compile_cuda

from urm_kernels.backends.cuda import launching, plan

SHARED_LIMIT = 99 << 10  # bytes a block may have on every card from sm_80 on


@functools.cache
def _compilations():
    """Some twenty seconds each: two at a time."""
    pool = ThreadPoolExecutor(2)
    return {name: pool.submit(compile_cuda.compiled, name) for name in compile_cuda.ARCHITECTURES}


@pytest.fixture(scope="module", params=compile_cuda.ARCHITECTURES, ids=lambda name: f"sm_{name}")
def kernels(request):
    """Every kernel by its name."""
    if compile_cuda.nvcc() is None:
        pytest.skip("needs nvcc on PATH")
    return {kernel.name: kernel for kernel in _compilations()[request.param].result()}


def named():
    """The kernels that csrc/cuda/kernels.h lists."""
    text = (compile_cuda.SOURCES / "cuda" / "kernels.h").read_text()
    found = [part.split(")", 1)[0] for part in text.split("each(")[1:]]
    return [name for name in found if name.startswith("urm::")]


def test_every_kernel_is_there_and_none_spills(kernels):
    assert {f"urm::{name}" for name in kernels} == set(named())
    assert [kernel for kernel in kernels.values() if kernel.spilled or kernel.stack] == []


def test_scans_multiply_bytes_on_the_tensor_cores_and_load_sixteen_at_a_time(kernels):
    scans = [kernel for name, kernel in kernels.items() if name.startswith("scan_codes")]
    assert len(scans) == 18
    for scan in scans:
        assert scan.instructions["IMMA"] >= 8 and scan.instructions["LDG.E.128"] >= 2, scan
        assert scan.product_loop > 0, scan


@pytest.mark.parametrize(("architecture", "most4", "most8"), [("80", 44, 52), ("90a", 38, 46), ("100a", 66, 78)])
def test_the_loop_over_columns_is_products_and_little_else(architecture, most4, most8):
    """Sixteen products, eight maxima, three loads from shared memory and what counts: no copies of operands."""
    if compile_cuda.nvcc() is None:
        pytest.skip("needs nvcc on PATH")
    loops = {kernel.name: kernel.product_loop for kernel in _compilations()[architecture].result()}
    assert 16 < loops["scan_codes<4, 4, false>"] <= most4
    assert 16 < loops["scan_codes<8, 4, false>"] <= most8


def test_two_blocks_of_a_scan_fit_a_multiprocessor(kernels):
    for name, kernel in kernels.items():
        if name.startswith("scan_codes"):
            assert kernel.registers * plan.THREADS * plan.SCAN_BLOCKS <= 65536, name


@pytest.mark.parametrize("places", [1, 2, 3, 4, 5, 8, 100, 128, 512, 3000])
@pytest.mark.parametrize("r", [1, 32, 64, 65, 128, 129, 1000, 8192])
def test_shared_memory_of_a_scan_fits_every_card(r, places):
    for users in (1, 3, 64, 256):
        scan = plan.plan_scan(users, places, r)
        assert 0 < scan.shared <= SHARED_LIMIT
        assert scan.group_users * plan.columns_of_user(places) % 8 == 0
        assert scan.steps == 0 or scan.steps * 32 >= r


def _nvrtc():
    """The run-time compiler of an installed package, its built-in functions loaded before it; None without one."""
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        for library in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(library))
    return None


@pytest.mark.parametrize("architecture", ["compute_80", "compute_90", "compute_100"])
def test_nvrtc_accepts_the_sources_with_the_options_that_cupy_is_given(architecture):
    nvrtc = _nvrtc()
    if nvrtc is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), launching.CODE.encode(), b"kernels.cu", 0, None, None) == 0
    for name in named():
        assert nvrtc.nvrtcAddNameExpression(program, name.encode()) == 0
    options = [*launching.options(launching.sources()), f"--gpu-architecture={architecture}"]
    result = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))
    )
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert result == 0 and log.value == b"", log.value.decode()


def test_the_report_has_every_kernel():
    text = (Path(__file__).resolve().parents[1] / "docs" / "kernels.md").read_text()
    for name in named():
        assert f"| {name.removeprefix('urm::')} |" in text
    assert all(f"## CUDA, sm_{name}" in text for name in compile_cuda.ARCHITECTURES)
