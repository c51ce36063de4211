"""One command on a machine with a GPU: the tests, ten latency cells and the card's ceilings, into one JSON and a table.

    python3 bench/gpu_acceptance.py [--minutes 20] [--only tests,ceilings,latency]

Needs python3 with torch, pytest and hypothesis. Every step is a process of its own with a time limit, and the JSON is
written after each, so that a step that fails, hangs or takes the process down costs its own figures only.
Without a device it says so and exits 0; with one, the exit status is 1 where a test failed or a result was wrong, or
where torch does not see it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "bench" / "results"
_TAIL = 4000  # characters of a step's output that are kept
_PRODUCT = 8192  # rows and columns of the products that measure the card


class Cell(NamedTuple):
    name: str
    dtype: str
    N: int
    r: int
    B: int
    M: int
    k: int


# N is small while the reference is what runs on a GPU: it computes each dot in float64, step by step. Raise it with
# the first kernels.
CELLS = [
    Cell("one user, one query", "float32", 200_000, 64, 1, 1, 100),
    Cell("one user, eight queries", "float32", 200_000, 128, 1, 8, 100),
    Cell("one user, eight queries, bf16", "bfloat16", 200_000, 128, 1, 8, 100),
    Cell("eight users", "float32", 100_000, 128, 8, 8, 100),
    Cell("eight users, bf16", "bfloat16", 100_000, 128, 8, 8, 100),
    Cell("many users", "bfloat16", 20_000, 128, 32, 16, 100),
    Cell("URM's 128 queries", "bfloat16", 50_000, 128, 1, 128, 100),
    Cell("large k", "bfloat16", 200_000, 128, 1, 8, 1000),
    Cell("narrow rows", "float16", 200_000, 32, 1, 8, 100),
    Cell("small call", "float32", 1_000, 64, 1, 1, 10),
]


def _seconds(torch: Any, call: Callable[[], Any], rounds: int) -> float:
    """Median of `rounds`, the device awaited on both sides."""
    call()
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def step_device() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"name": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def step_ceilings() -> dict[str, Any]:
    """Bytes read and written a second by a copy; matrix product rates of torch. fp32 is without tf32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    free, _ = torch.cuda.mem_get_info()
    source = torch.ones(min(1 << 30, free // 16), dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    out = {"copy_gb_per_s": 2 * source.nbytes / _seconds(torch, lambda: target.copy_(source), 10) / 1e9}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(_PRODUCT, _PRODUCT, device="cuda").to(dtype)
        out[f"{name}_tflop_per_s"] = 2 * _PRODUCT**3 / _seconds(torch, functools.partial(torch.mm, a, a), 5) / 1e12
    return {name: round(value, 1) for name, value in out.items()}


def step_latency(index: int) -> dict[str, Any]:
    """One cell: checked against float64, then ours and torch in turns."""
    import torch

    import urm_kernels
    from urm_kernels import testing
    from urm_kernels.backends import select

    cell = CELLS[index]
    items = testing.make_items("decay", cell.N, cell.r, seed=0)
    queries = testing.make_queries("decay", cell.B, cell.M, cell.r, seed=1, items=items).cuda()
    items = items.cuda().to(getattr(torch, cell.dtype))
    flat = queries.reshape(-1, cell.r)

    def ours() -> Any:
        return urm_kernels.score_topk(queries, items, cell.k)

    def by_torch(dtype: Any) -> Any:
        dots = flat.to(dtype) @ items.to(dtype).T
        return dots.view(cell.B, cell.M, cell.N).amax(1).topk(cell.k)

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = ours()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    tolerance = testing.score_tolerance(queries, items)
    testing.compare_topk(result, testing.full_scores(queries, items), tolerance=tolerance)
    rounds = 3 if cell.N > 10_000 else 30
    seconds = _seconds(torch, ours, rounds)
    exact = _seconds(torch, lambda: by_torch(torch.float32), rounds)
    same_dtype = exact if cell.dtype == "float32" else _seconds(torch, lambda: by_torch(items.dtype), rounds)
    return {
        "ms": round(seconds * 1e3, 4),
        "torch_fp32_ms": round(exact * 1e3, 4),
        "torch_same_dtype_ms": round(same_dtype * 1e3, 4),
        "gb_per_s": round(items.nbytes / seconds / 1e9, 2),
        "tflop_per_s": round(2 * cell.B * cell.M * items.numel() / seconds / 1e12, 4),
        "extra_mib": round(extra / 2**20, 2),
        "backend": select.choose(queries, items, None, "").__name__.rpartition(".")[2],
    }


def _run(command: list[str], limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """status: ok, failed (with the exit status) or timed out; the end of what it printed is kept either way."""
    began = time.monotonic()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A session of its own: what the step started in turn goes with it, and cannot hold the pipe open.
    with subprocess.Popen(command, cwd=_ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=limit)
            status = "ok" if process.returncode == 0 else f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = f"timed out after {limit:.0f} s"
    return {"status": status, "seconds": round(time.monotonic() - began, 1), "output": _tidy(output)}


def _tidy(output: str) -> str:
    return output.replace(str(_ROOT), ".").replace(sys.prefix, "<python>").replace(str(Path.home()), "~")[-_TAIL:]


def _measure(step: str, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """A step of this file in a process of its own; its figures are the last line that it prints."""
    done = _run([sys.executable, str(Path(__file__).resolve()), "--step", step], limit, environment)
    if done["status"] == "ok":
        done |= json.loads(done.pop("output").strip().splitlines()[-1])
    return done


def _tests(limit: float, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "python_tests", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    done = _run(command, limit, environment | {"URM_TEST_DEVICE": "cuda"})
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed)", done["output"])
    return done | {"counts": {word: int(number) for number, word in counts}}


def _write(report: dict[str, Any]) -> Path:
    _RESULTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "_", report["device"]["name"].lower()).strip("_")
    path = _RESULTS / f"gpu_acceptance_{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def _last_line(done: dict[str, Any]) -> str:
    return (done["output"].strip().splitlines() or ["no output"])[-1]


def _table(report: dict[str, Any]) -> list[str]:
    device = report["device"]
    lines = [f"{device['name']} (sm {device['capability']}, {device['memory_gib']} GiB), torch {device['torch']}"]
    for step in ("tests", "ceilings"):
        if step in report:
            kept = {key: value for key, value in report[step].items() if key not in ("output", "status", "seconds")}
            lines.append(f"{step}: {report[step]['status']} in {report[step]['seconds']} s {kept or ''}")
    if "latency" in report:
        lines.append(
            f"{'cell':32}{'dtype':10}{'N':>9}{'ms':>11}{'torch fp32':>12}{'same dtype':>12}{'GB/s':>9}  backend"
        )
    for cell, done in zip(CELLS, report.get("latency", []), strict=False):
        start = f"{cell.name:32}{cell.dtype:10}{cell.N:>9}"
        if done["status"] != "ok":
            lines.append(f"{start}  {done['status']}: {_last_line(done)}")
            continue
        lines.append(
            f"{start}{done['ms']:>11.3f}{done['torch_fp32_ms']:>12.3f}{done['torch_same_dtype_ms']:>12.3f}"
            f"{done['gb_per_s']:>9.1f}  {done['backend']}"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="for everything; each step gets a share")
    parser.add_argument("--only", default="ceilings,latency,tests", help="steps to run, comma-separated")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        name, _, index = arguments.step.partition(":")
        steps = {"device": step_device, "ceilings": step_ceilings, "latency": lambda: step_latency(int(index))}
        print(json.dumps(steps[name]()))
        return 0

    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    end = time.monotonic() + 60 * arguments.minutes

    def left(most: float) -> float:
        return max(5.0, min(most, end - time.monotonic()))

    device = _measure("device", left(180), environment)
    if device["status"] != "ok" or device["name"] is None:
        present = any(Path("/dev").glob("nvidia[0-9]*"))
        reason = "torch sees no CUDA device" if device["status"] == "ok" else _last_line(device)
        print(f"{'a GPU is there, but' if present else 'no GPU to accept:'} {reason}")
        return 1 if present else 0
    report: dict[str, Any] = {"device": device}
    wanted = arguments.only.split(",")
    # Short figures first: the tests take what is left.
    if "ceilings" in wanted:
        report["ceilings"] = _measure("ceilings", left(120), environment)
        _write(report)
    if "latency" in wanted:
        report["latency"] = []
        for index in range(len(CELLS)):
            done = _measure(f"latency:{index}", left(90), environment)
            report["latency"].append({**CELLS[index]._asdict(), **done})
            _write(report)
    if "tests" in wanted:
        report["tests"] = _tests(left(60 * arguments.minutes), environment)
        _write(report)
    print("\n".join(_table(report)))
    steps = [report[step] for step in ("ceilings", "tests") if step in report] + report.get("latency", [])
    return 0 if all(step["status"] == "ok" for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
