"""The Triton kernels as the compiler leaves them, for three architectures: no spills, tensor cores, shared memory."""

import functools
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import compile_only
import kernel_report


@functools.cache
def _reports():
    """A minute or two each: side by side."""
    pool = ThreadPoolExecutor(len(kernel_report.ARCHITECTURES))
    return {number: pool.submit(kernel_report.report, number) for number in kernel_report.ARCHITECTURES}


@pytest.fixture(scope="module", params=kernel_report.ARCHITECTURES, ids=lambda number: f"sm_{number}")
def compiled(request):
    """(architecture, every kernel's figures)."""
    try:
        return request.param, _reports()[request.param].result()["kernels"]
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_no_kernel_spills_or_wants_more_shared_memory_than_there_is(compiled):
    architecture, kernels = compiled
    most = kernel_report.SHARED_LIMIT[architecture]
    greedy = [kernel for kernel in kernels if kernel["spills"] or kernel["shared"] > most]
    assert not greedy


def test_the_scan_runs_on_the_tensor_cores(compiled):
    architecture, kernels = compiled
    scans = [kernel for kernel in kernels if kernel["kernel"] == "scan"]
    assert len(scans) >= 20
    for scan in scans:
        assert set(scan["instructions"]) & set(kernel_report.MATRIX_UNIT[architecture]), scan


def test_a_score_that_is_appended_in_ptx_is_one_threads_alone(compiled):
    # A layout that gives copies of a score to several threads would append its row several times.
    sparse = [kernel for kernel in compiled[1] if kernel["appended"]]
    assert len(sparse) >= 3
    for kernel in sparse:
        rows, columns, layout = kernel["appended"]
        held = rows * columns // (32 * int(kernel["constants"]["num_warps"]))
        assert _elements_a_thread(layout, rows, columns) == held, kernel


def _elements_a_thread(layout, rows, columns):
    """How many elements of a tensor a thread holds, copies counted."""
    if "linear" in layout:
        bases = re.findall(r"(register|lane|warp|block) = \[((?:\[[\d, ]+\](?:, )?)*)\]", layout)
        counts = {kind: len(re.findall(r"\[", text)) for kind, text in bases}
        moved = {
            kind: len([b for b in re.findall(r"\[([\d, ]+)\]", text) if set(b) - set("0, ")]) for kind, text in bases
        }
        assert counts["lane"] == moved["lane"] and counts["warp"] == moved["warp"], "threads hold copies"
        return 2 ** counts["register"]
    found = {key: [int(n) for n in value.split(",")] for key, value in re.findall(r"(\w+) = \[([\d, ]+)\]", layout)}
    if "instrShape" in found:
        down, across = (w * i for w, i in zip(found["warpsPerCTA"], found["instrShape"], strict=False))
    else:
        parts = (found["sizePerThread"], found["threadsPerWarp"], found["warpsPerCTA"])
        down, across = (a * b * c for a, b, c in zip(*parts, strict=True))
    warps = found["warpsPerCTA"][0] * found["warpsPerCTA"][1]
    return -(-rows // down) * -(-columns // across) * down * across // (32 * warps)


def test_noise_is_rounded_operation_by_operation():
    found = [launch for launch in kernel_report.launches(kernel_report.CASES[0], 90) if launch.kernel == "perturb_rows"]
    assert found
    for launch in found:
        code = launch.compiled.asm["ptx"]
        assert "fma" not in code and "div.full" not in code and "div.rn.f64" in code


def test_launches_fit_the_grid_at_a_hundred_million_rows_and_many_users():
    case = kernel_report.Case(kernel_report.BFLOAT16, 128, 70_000, 1, rows=10**8, whole=True)
    found = kernel_report.launches(case, 90)
    assert len(found) > 60 * 12  # groups of users
    functions = {"scan", "score_rows", "dot_rows", "add_exponentials", "weigh_rows"}
    assert functions < {launch.kernel for launch in found}
    for launch in found:
        x, y, *_ = (*launch.grid, 1)
        assert 1 <= x < 2**31 and 1 <= y < 2**16, launch.kernel


def test_float8_tables_reach_the_tensor_cores_as_bfloat16_where_the_card_can_widen_them(compiled):
    architecture, kernels = compiled
    scans = [kernel for kernel in kernels if "float8" in kernel["case"] and kernel["kernel"] == "scan"]
    assert len(scans) == (0 if architecture < 89 else 10)


def test_the_report_names_every_kernel():
    text = (Path(__file__).resolve().parents[1] / "docs" / "kernels.md").read_text()
    names = {launch.kernel for launch in kernel_report.launches(kernel_report.CASES[0], 90)} - {"scan"}
    assert len(names) >= 10 and all(re.search(rf"\| {name}[ ,]", text) for name in names)
    assert all(f"## sm_{number}" in text for number in kernel_report.ARCHITECTURES)


def test_recording_leaves_triton_as_it_was():
    from triton.runtime.jit import JITFunction

    before = JITFunction.run
    with pytest.raises(RuntimeError, match="on purpose"), compile_only.recorded(90):
        raise RuntimeError("on purpose")
    assert JITFunction.run is before
