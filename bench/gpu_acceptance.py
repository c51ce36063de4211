"""One command on a machine with a GPU: the tests, latency cells, ceilings and memory checks, into one JSON and a table.

    python3 bench/gpu_acceptance.py [--minutes 20] [--only latency,packed,functions,tests,sanitizer] [--cells PATTERN]
                                    [--full] [--resume]

Needs python3 with torch, triton, pytest and hypothesis (pytest-xdist is used where it is there), and no network. Every
step is a process of its own with a time limit, and the JSON is written after each, so that a step that fails, hangs or
takes the process down costs its own figures only. --full measures the product of all sizes; --resume keeps the cells
that the JSON has already. Without a device it says so and exits 0; with one, the exit status is 1 where a test failed
or a result was wrong, or where torch does not see it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "bench" / "results"
_TAIL = 4000  # characters of a step's output that are kept
_WORKERS = 14  # test processes that share the device, at most
_CELLS = {"latency": "gpu_cells", "packed": "gpu_packed", "functions": "gpu_functions"}  # modules by step
# Steps in turn, and which part of the time each may count on; what is not used is left to those after it.
_SHARES = {"latency": 0.3, "packed": 0.2, "functions": 0.1, "tests": 0.25, "sanitizer": 0.15}
# What compute-sanitizer watches: every kernel once, on small shapes.
_WATCHED = (
    "test_values.py::test_hard_orders_of_the_catalogue",
    "test_shapes.py::test_more_wanted_than_allowed",
    "test_candidates.py::test_pads_duplicates_and_every_order",
    "test_partition.py::test_what_takes_no_part",
    "test_partition_gradients.py::test_shares_add_up_and_masked_rows_have_none",
)
_WATCHED_PACKED = (
    "test_values.py::test_hard_orders_of_the_catalogue",
    "test_values.py::test_nan_and_infinity_in_a_query_that_does_not_exist_are_not_looked_at",
    "test_values.py::test_infinite_bias_orders_rows_and_meets_opposite_infinity_as_nan",
    "test_shapes.py::test_more_wanted_than_allowed",
    "test_shapes.py::test_one_survivor_and_none",
    "test_shapes.py::test_strided_queries_bias_and_masks",
)
# Tests, which of their machines, and options. Hazards of shared memory are looked for in our own kernels; what torch's
# write is watched, too, or initcheck would call it unwritten.
_TOOLS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "memcheck": (_WATCHED, "triton or cuda", ()),
    "racecheck": (_WATCHED_PACKED, "cuda", ("--kernel-name", "kns=_ZN3urm")),
    "initcheck": (_WATCHED_PACKED, "cuda", ()),
}


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
        "triton": importlib.util.find_spec("triton") and __import__("triton").__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def step_cells(names: list[str]) -> None:
    """Cells of one table; prints a line of JSON for each as soon as it is measured."""
    for module in map(importlib.import_module, _CELLS.values()):
        known = module.named_cells() + (module.all_cells() if hasattr(module, "all_cells") else [])
        by_name = {cell.name: cell for cell in known}
        cells = [by_name[name] for name in names if name in by_name]
        for cell, figures in module.run_table(cells) if cells else ():
            print(json.dumps({"cell": cell.name, **cell._asdict(), **figures}), flush=True)


def _run(command: list[str], limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """status: ok, failed (with the exit status) or timed out; what it printed is kept either way."""
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
    return output.replace(str(_ROOT), ".").replace(sys.prefix, "<python>").replace(str(Path.home()), "~")


def _tail(done: dict[str, Any]) -> dict[str, Any]:
    return done | {"output": done["output"][-_TAIL:]}


def _lines(done: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done["output"].splitlines() if line.startswith("{") and line.endswith("}")]


def _step(step: str, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    return _run([sys.executable, str(Path(__file__).resolve()), "--step", step], limit, environment)


def _device(limit: float, environment: dict[str, str]) -> dict[str, Any]:
    done = _step("device", limit, environment)
    return done | _lines(done)[-1] if done["status"] == "ok" else done


def _measured(cells: list[Any], limit: float, environment: dict[str, str]) -> list[dict[str, Any]]:
    """What was measured of one table, and for the rest of the cells why not."""
    done = _step("cells:" + json.dumps([cell.name for cell in cells]), limit, environment)
    measured = {line["cell"]: line for line in _lines(done) if "cell" in line}
    missing = {"status": "not measured: " + (_last_line(done) if done["status"] == "ok" else done["status"])}
    if done["status"].startswith("failed"):
        missing["status"] += ": " + _last_line(done)
    return [measured.get(cell.name) or {"cell": cell.name, **cell._asdict(), **missing} for cell in cells]


def _tests(limit: float, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "python_tests", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(_WORKERS, os.cpu_count() or 1))]
    done = _run(command, limit, environment | {"URM_TEST_DEVICE": "cuda"})
    return _tail(done) | {"counts": _counts(done)}


def _counts(done: dict[str, Any]) -> dict[str, int]:
    """Tests by what became of them."""
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed)", done["output"][-_TAIL:])
    return {word: int(number) for number, word in counts}


def _sanitizer(limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """compute-sanitizer's tools over a few tests, each with its part of the time; a host without it, or that forbids
    it, is recorded, not a failure."""
    if not shutil.which("compute-sanitizer"):
        return {"status": "not available: no compute-sanitizer on the PATH", "seconds": 0.0, "output": ""}
    end, tools = time.monotonic() + limit, {}
    for tool in _TOOLS:
        part = (end - time.monotonic()) / (len(_TOOLS) - len(tools))
        tools[tool] = _sanitized(tool, max(5.0, part), environment)
    worst_first = [done["status"] for done in sorted(tools.values(), key=_fine)]
    status = next((status for status in worst_first if status != "ok"), "ok")
    return {"status": status, "seconds": round(sum(done["seconds"] for done in tools.values()), 1), "tools": tools}


def _sanitized(tool: str, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    tests, machines, options = _TOOLS[tool]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *options]
    command += [sys.executable, "-m", "pytest", *(f"python_tests/{name}" for name in tests)]
    command += ["-q", "-k", machines, "-p", "no:cacheprovider"]
    plain = {"URM_TEST_DEVICE": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = _run(command, limit, environment | plain)
    passed, errors = _counts(done).get("passed", 0), re.findall(r"SUMMARY: (\d+) (?:error|hazard)", done["output"])
    if "Device not supported" in done["output"]:
        done["status"] = "not available: the host does not allow it"
    elif done["status"] == "ok" and not passed:
        done["status"] = "not available: no test could run"
    return _tail(done) | {"passed": passed, "errors": sum(map(int, errors)) if errors else None}


def _path(device: dict[str, Any]) -> Path:
    return _RESULTS / f"gpu_acceptance_{re.sub(r'[^a-z0-9]+', '_', device['name'].lower()).strip('_')}.json"


def _write(report: dict[str, Any]) -> None:
    _RESULTS.mkdir(parents=True, exist_ok=True)
    _path(report["device"]).write_text(json.dumps(report, indent=1) + "\n")


def _last_line(done: dict[str, Any]) -> str:
    return (done["output"].strip().splitlines() or ["no output"])[-1]


def _fine(step: dict[str, Any]) -> bool:
    return step["status"] == "ok" or step["status"].startswith("not available")


def _table(report: dict[str, Any]) -> list[str]:
    device = report["device"]
    lines = [f"{device['name']} (sm {device['capability']}, {device['memory_gib']} GiB), torch {device['torch']}"]
    done_by = {step: report[step] for step in ("extension", "tests", "sanitizer") if step in report}
    for step, done in (done_by | report.get("sanitizer", {}).get("tools", {})).items():
        kept = {key: value for key, value in done.items() if key not in ("output", "status", "seconds", "tools")}
        lines.append(f"{step}: {done['status']} in {done['seconds']} s {kept or ''}".rstrip())
    if report.get("latency"):
        heads = ("ms", "graph", "floor", "of floor", "extra %", "torch", "half fused", "unproven")
        lines.append(f"{'cell':38}" + "".join(f"{head:>11}" for head in heads))
    for done in report.get("latency", []):
        if done["status"] != "ok":
            lines.append(f"{done['cell']:38}  {done['status']}")
            continue
        peers = dict(done["peers_ms"])
        figures = (done["ms"], done["graph_ms"], done["floor_ms"], done["of_floor"], 100 * done["extra_share"])
        columns = (*figures, peers.pop("torch"), peers.pop("half_fused"))
        more = "".join(f"  {name} {figure}" for name, figure in peers.items())
        lines.append(
            f"{done['cell']:38}{''.join(f'{figure:>11.3f}' for figure in columns)}{done['unproven_users']:>11}{more}"
        )
    lines += _packed_lines(report.get("packed", []))
    if report.get("functions"):
        heads = ("ms", "graph", "floor", "of floor", "extra MiB", "torch")
        lines.append(f"{'cell':54}" + "".join(f"{head:>11}" for head in heads))
    for done in report.get("functions", []):
        if done["status"] != "ok":
            lines.append(f"{done['cell']:54}  {done['status']}")
            continue
        figures = (done["ms"], done["graph_ms"], done["floor_ms"], done["of_floor"], done["extra_mib"])
        told = ("-" if figure is None else f"{figure:.3f}" for figure in (*figures, done["peers_ms"]["torch"]))
        lines.append(f"{done['cell']:54}" + "".join(f"{figure:>11}" for figure in told))
    lines += [f"not measured: {name}: {reason}" for name, reason in report.get("missing_peers", {}).items()]
    return lines


def _packed_lines(cells: list[dict[str, Any]]) -> list[str]:
    """plain: the call without codes, replayed as well. survive: of all pairs. scored: pairs, for each result."""
    heads = ("ms", "graph", "host", "floor", "of floor", "of s8", "extra MiB", "plain", "survive %", "scored/k")
    lines = [f"{'cell':48}" + "".join(f"{head:>11}" for head in heads)] if cells else []
    for done in cells:
        name = f"{done['cell']:48}"
        if done["status"] != "ok":
            lines.append(f"{name}  {done['status']}")
        elif "rows_per_s" in done:
            rate, bar = done["rows_per_s"] / 1e6, done["bar_rows_per_s"] / 1e6
            words = f"{rate:.0f} million rows/s, bar {bar:.0f}: {'met' if done['met'] else 'missed'}"
            lines.append(f"{name}{done['ms']:>11.3f}  {words}")
        else:
            told = ("ms", "graph_ms", "host_ms", "floor_ms", "of_floor", "of_s8_rate", "extra_mib")
            figures = [*(done[key] for key in told), done["peers_ms"]["plain"]]
            figures += [100 * done["survivors"] / done["pairs"], done["scored"] / (done["B"] * done["k"])]
            lines.append(name + "".join(f"{figure:>11.3f}" for figure in figures))
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="for everything; each step gets a share")
    parser.add_argument("--only", default=",".join(_SHARES), help="steps to run, comma-separated")
    parser.add_argument("--full", action="store_true", help="the product of all sizes instead of the named cells")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON has of this card")
    parser.add_argument("--cells", default="", help="only cells whose name holds this regular expression")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    if arguments.step == "device":
        print(json.dumps(step_device()))
        return 0
    if arguments.step:
        step_cells(json.loads(arguments.step.partition(":")[2]))
        return 0

    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    wanted = arguments.only.split(",")
    began, seconds = time.monotonic(), 60 * arguments.minutes

    def left(step: str, most: float) -> float:
        later = list(_SHARES)[list(_SHARES).index(step) + 1 :]
        kept = sum(_SHARES[other] for other in later if other in wanted)
        return max(5.0, min(most, began + seconds * (1 - kept) - time.monotonic()))

    device = _device(min(180.0, seconds), environment)
    if device["status"] != "ok" or device["name"] is None:
        present = any(Path("/dev").glob("nvidia[0-9]*"))
        reason = "torch sees no CUDA device" if device["status"] == "ok" else _last_line(device)
        print(f"{'a GPU is there, but' if present else 'no GPU to accept:'} {reason}")
        return 1 if present else 0
    device.pop("output", None)
    report: dict[str, Any] = {"device": device}
    sys.path.insert(0, str(Path(__file__).parent))
    import gpu_build

    extension = _tail(gpu_build.extensions(_run, min(240.0, seconds / 3), environment))
    if arguments.resume and _path(device).exists():
        report = json.loads(_path(device).read_text()) | report
    report["extension"] = extension
    _write(report)
    for step in _CELLS:
        if step in wanted:
            _measure_cells(step, report, arguments.full, arguments.cells, functools.partial(left, step), environment)
    if "tests" in wanted:
        report["tests"] = _tests(left("tests", seconds), environment)
        _write(report)
    if "sanitizer" in wanted:
        report["sanitizer"] = _sanitizer(left("sanitizer", 300), environment)
        _write(report)
    print("\n".join(_table(report)))
    steps = [report[step] for step in ("extension", "tests", "sanitizer") if step in report]
    steps += [cell for step in _CELLS for cell in report.get(step, [])]
    return 0 if all(map(_fine, steps)) else 1


def _measure_cells(
    step: str, report: dict[str, Any], full: bool, pattern: str, left: Any, environment: dict[str, str]
) -> None:
    import gpu_cells
    import gpu_peers

    cells: list[Any] = importlib.import_module(_CELLS[step]).named_cells()
    if step == "latency":
        cells = gpu_cells.all_cells() if full else cells
        report["missing_peers"] = gpu_peers.installed()[1]
    cells = [cell for cell in cells if re.search(pattern, cell.name)]
    kept = {line["cell"]: line for line in report.get(step, []) if line["status"] == "ok"}
    for table in dict.fromkeys(cell.table for cell in cells):
        of_table = [cell for cell in cells if cell.table == table and cell.name not in kept]
        if of_table:
            kept |= {line["cell"]: line for line in _measured(of_table, left(30 + 10 * len(of_table)), environment)}
        report[step] = list(kept.values())
        _write(report)


if __name__ == "__main__":
    sys.exit(main())
