"""What the compiler makes of every kernel, on a machine without a GPU: writes docs/kernels.md.

python3 bench/kernel_report.py
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import compile_cuda
import compile_only
import torch
import triton

from urm_kernels.backends.table_view import ScanOptions, TableView, Walk
from urm_kernels.backends.triton import candidates, explore, partition, partition_gradient, search
from urm_kernels.backends.triton.plan import Card

ARCHITECTURES = (80, 90, 100)
MATRIX_UNIT = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCMMA", "UTCQMMA")}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
_PATH = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
_PROCESSORS = 132


class Case(NamedTuple):
    """One call, on tensors without memory."""

    dtype: torch.dtype
    r: int
    B: int
    M: int
    reduce: str = "max"
    filtered: bool = False  # bias, a mask of every user's own, excluded rows
    rows: int = 50_000_000
    k: int = 1000
    row_scale: bool = False
    whole: bool = False  # score_candidates, log_partition and gradients as well

    @property
    def name(self) -> str:
        extra = f", {self.reduce}" * (self.reduce != "max") + ", bias, mask, exclude" * self.filtered
        extra += ", scaled" * self.row_scale
        return f"{str(self.dtype)[6:]} r={self.r} ({self.B}, {self.M}){extra}" + f", N={self.rows}" * (
            self.rows < 10**6
        )


BFLOAT16, FLOAT16, FLOAT32, FLOAT8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
CASES = [
    *(Case(BFLOAT16, 128, *shape, whole=True) for shape in ((1, 1), (1, 8), (1, 128), (64, 1), (1024, 1))),
    Case(BFLOAT16, 128, 8, 16, whole=True),
    Case(BFLOAT16, 64, 1, 8),
    Case(BFLOAT16, 64, 1024, 1),
    Case(BFLOAT16, 128, 500, 4, whole=True),
    Case(BFLOAT16, 256, 8, 8),
    Case(BFLOAT16, 300, 1, 8),
    Case(BFLOAT16, 300, 64, 1, whole=True),
    Case(FLOAT16, 128, 1, 8),
    Case(FLOAT16, 128, 64, 1, whole=True),
    Case(FLOAT32, 128, 1, 8, whole=True),
    Case(FLOAT32, 64, 1, 128, whole=True),
    Case(FLOAT32, 128, 1024, 1),
    Case(BFLOAT16, 128, 1, 8, "logsumexp", True),
    Case(FLOAT32, 64, 8, 1, "mean", True, whole=True),
    Case(FLOAT32, 128, 2, 8, rows=5000),
    *(Case(FLOAT8, 128, *shape, row_scale=True) for shape in ((1, 8), (1, 128), (64, 1), (1024, 1))),
    Case(FLOAT8, 300, 1, 200, row_scale=True, whole=True),
    Case(FLOAT16, 128, 2, 8, "logsumexp", True, row_scale=True, whole=True),
    # What has spilled once: masks of many users, and scales beside them.
    Case(BFLOAT16, 128, 1024, 1, filtered=True, row_scale=True),
    Case(BFLOAT16, 128, 64, 1, filtered=True),
    Case(BFLOAT16, 128, 8, 16, filtered=True, row_scale=True),
    Case(BFLOAT16, 128, 64, 4, row_scale=True),
    Case(BFLOAT16, 300, 1024, 1, filtered=True, row_scale=True),
    Case(BFLOAT16, 128, 64, 4, "logsumexp", True, row_scale=True),
    Case(BFLOAT16, 128, 2, 100, "logsumexp", True, row_scale=True),
    Case(BFLOAT16, 128, 1, 200),
    Case(FLOAT16, 300, 64, 1, row_scale=True),
    Case(FLOAT32, 128, 8, 16),
    Case(FLOAT32, 128, 1, 8, "logsumexp", row_scale=True),
    Case(BFLOAT16, 256, 64, 4, filtered=True),
]


def cases(architecture: int) -> list[Case]:
    """Those that the backend does not decline there."""
    return [case for case in CASES if case.dtype != FLOAT8 or architecture >= 89]


def launches(case: Case, architecture: int) -> list[compile_only.Launch]:
    """Every launch of the call and of its backward pass, compiled."""
    meta: dict[str, Any] = {"device": "meta"}
    queries = torch.empty(case.B, case.M, case.r, **meta)
    items = torch.empty(case.rows, case.r, dtype=case.dtype, **meta)
    bias = mask = exclude = None
    if case.filtered:
        bias = torch.empty(case.rows, **meta)
        mask = torch.empty(case.B, case.rows, dtype=torch.bool, **meta)
        exclude = torch.empty(case.B, 50, dtype=torch.int64, **meta)
    row_scale = torch.empty(case.rows, **meta) if case.row_scale else None
    table, card = TableView(items, bias, row_scale), Card(_PROCESSORS, architecture)
    options = ScanOptions(None, case.reduce, mask, exclude)
    temperature, per_user = torch.empty((), **meta), torch.empty(case.B, **meta)
    rows = torch.empty(case.B, 100, dtype=torch.int64, **meta)
    neighbors, seed = torch.empty(case.rows, 32, dtype=torch.int32, **meta), torch.empty((), dtype=torch.int64, **meta)
    with compile_only.recorded(architecture) as found:
        search.search(queries, table, options, case.k, True, card)
        for chosen in (rows, rows[0]) if case.whole else ():
            candidates.score_candidates(queries, table, chosen, None, case.reduce)
            candidates.candidate_dots(queries, table, chosen)
        if case.whole:
            partition.log_partition(queries, table, options, temperature, card)
            walk = Walk(neighbors, 1000, [100, 200], seed, rows[:, 0])
            explore.explore_topk(queries, table, options, walk, temperature, 100)
            weigh = (per_user, per_user, queries, table, options, temperature, slice(0, 1000), card)
            partition_gradient.partition_weights(*weigh)
    return found


def kernels(architecture: int) -> Iterator[dict[str, Any]]:
    """Each compiled kernel once, with the first case that launches it."""
    seen = set()
    for case in cases(architecture):
        for launch in launches(case, architecture):
            if launch.compiled.hash not in seen:
                seen.add(launch.compiled.hash)
                yield {
                    "case": case.name,
                    "kernel": launch.kernel,
                    "constants": {name: repr(value) for name, value in launch.constants.items()},
                    "described": _described(launch),
                    "appended": _appended(launch),
                    **compile_only.resources(launch)._asdict(),
                }


def _appended(launch: compile_only.Launch) -> list[Any] | None:
    """[rows, columns, layout] of the scores that PTX appends, None where it appends none."""
    code = launch.compiled.asm["ttgir"]
    found = re.search(r'elementwise_inline_asm "[^"]*setp\.geu.*?: tensor<(\d+)x(\d+)xf32, (#\w+)>', code, re.S)
    if found is None:
        if "setp.geu" in code:
            raise RuntimeError(
                "scores of a layout that is not understood are appended in PTX: teach _appended to read it"
            )
        return None
    return [int(found[1]), int(found[2]), re.search(rf"^{found[3]} = (.*)$", code, re.M)[1]]


def report(architecture: int) -> dict[str, Any]:
    """What `kernels` finds, in a process of its own, by the Triton that compiles for this architecture."""
    environment = dict(os.environ)
    if architecture >= 100:
        folder = environment.get("URM_TRITON_BLACKWELL")
        if not folder or not Path(folder).is_dir():
            raise FileNotFoundError(
                "URM_TRITON_BLACKWELL: the folder of a Triton >= 3.8 is wanted; make test sets it up"
            )
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, environment.get("PYTHONPATH")]))
    command = [sys.executable, __file__, "--json", str(architecture)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"sm_{architecture}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _described(launch: compile_only.Launch) -> str:
    constants = launch.constants
    if launch.kernel == "scan":
        what = "sample" if constants["GATHERED"] else "table"
        swap = ", swapped" if constants["SWAP"] else ""
        size = f"{constants['BLOCK_N']} x {constants['BLOCK_C']} x {constants['BLOCK_R']}"
        return f"scan of the {what}, {size}, {constants['num_warps']} warps{swap}"
    if constants.get("BLOCK_C"):
        return f"{launch.kernel}, {constants['C']} rows, queries bounded {constants['BLOCK_C']} at a time"
    if "USERS" in constants:
        return f"{launch.kernel}, {constants['C']} rows x {constants['D']} queries of {constants['USERS']} users"
    return launch.kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=int, help=argparse.SUPPRESS)
    architecture = parser.parse_args().json
    if architecture:
        print(json.dumps({"triton": triton.__version__, "kernels": list(kernels(architecture))}))
        return
    lines = [
        "# What the compiler makes of the kernels",
        "",
        "Written by `make kernel-report`; no GPU is needed. The launches are those of the real pipeline on tensors",
        "without memory (`bench/compile_only.py`), so this is what runs. Registers are a thread's; shared memory, in",
        "bytes, a program's; loops are numbers of instructions, those of loops within included.",
        "`HMMA`, `HGMMA` and `UTCHMMA` are matrix products on the tensor cores of the three",
        "architectures, `LDGSTS` copies to shared memory that skip the registers, `ATOMG` atomics; counts are of",
        "instructions in the code, not of executions. Tests hold spills at zero",
        "(`python_tests/test_compiled_kernels.py`). float8 tables need sm_89: sm_80 declines them with the reason.",
        "The kernels of packed tables, which nvcc compiles, come last (`bench/compile_cuda.py`,",
        "`python_tests/test_compiled_cuda.py`): `IMMA` are integer matrix products on the tensor cores, `VIMNMX3` the",
        "larger of three integers; the loop of products goes over eight columns at a time.",
    ]
    with ThreadPoolExecutor(len(ARCHITECTURES)) as pool:
        reports = list(pool.map(report, ARCHITECTURES))
    for architecture, found in zip(ARCHITECTURES, reports, strict=True):
        lines += ["", f"## sm_{architecture} (triton {found['triton']})", ""]
        lines += ["| kernel | first used by | registers | shared | spills | loops | instructions |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for each in found["kernels"]:
            told = ", ".join(f"{name} {count}" for name, count in each["instructions"].items())
            figures = f"{each['registers']} | {each['shared']} | {each['spills']}"
            loops = " ".join(map(str, each["loops"]))
            lines.append(f"| {each['described']} | {each['case']} | {figures} | {loops} | {told} |")
    for architecture in compile_cuda.ARCHITECTURES if compile_cuda.nvcc() else ():
        lines += cuda_lines(architecture)
    _PATH.write_text("\n".join(lines) + "\n")


def cuda_lines(architecture: str) -> list[str]:
    """The part of the kernels that nvcc compiles."""
    lines = ["", f"## CUDA, sm_{architecture} (nvcc)", ""]
    lines += ["| kernel | registers | spills | loop of products | instructions |", "| --- | --- | --- | --- | --- |"]
    for kernel in compile_cuda.compiled(architecture):
        told = ", ".join(f"{name} {count}" for name, count in kernel.instructions.items())
        loop = kernel.product_loop or ""
        lines.append(f"| {kernel.name} | {kernel.registers} | {kernel.spilled} | {loop} | {told} |")
    return lines


if __name__ == "__main__":
    main()
