"""The GPU acceptance command without a GPU: steps that fail or hang, what is written, how a result is checked."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from urm_kernels import score_topk

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import gpu_build
import gpu_cells
import gpu_functions
import gpu_packed
import gpu_peers

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_acceptance.py"
CARD = {"status": "ok", "seconds": 1.0, "name": "Sham 100", "capability": "9.0", "memory_gib": 80.0, "torch": "2"}
FIGURES = {
    "status": "ok", "ms": 2.0, "graph_ms": 1.5, "floor_ms": 1.0, "of_floor": 0.7, "extra_share": 0.001,
    "unproven_users": 0, "peers_ms": {"torch": 3.0, "half_fused": 2.5},
    "ceilings": {"copy_gb_per_s": 4000.0, "bf16_tflop_per_s": 800.0},
}  # fmt: skip
PACKED = {
    **FIGURES, "host_ms": 0.2, "of_s8_rate": 0.1, "unproven_users": 0, "survivors": 90_000, "scored": 2000,
    "pairs": 50_000_000, "bytes_read": 10**9, "found_share": 1.0, "peers_ms": {"plain": 6.0, "plain_call": 6.5},
}  # fmt: skip
ENCODED = {
    "status": "ok", "ms": 8.0, "floor_ms": 0.4, "of_floor": 0.05, "rows_per_s": 5e8, "bar_rows_per_s": 2e8, "met": True,
    "ceilings": FIGURES["ceilings"],
}  # fmt: skip


def figures_of(cell):
    return {gpu_packed.Encoding: ENCODED, gpu_packed.Cell: PACKED}.get(type(cell), FIGURES)


def tables(cells):
    return list(dict.fromkeys(cell.table for cell in cells))


def failed(words):
    return {"status": "failed (1)", "seconds": 0.1, "output": f"Traceback\n{words}\n"}


@pytest.fixture
def acceptance(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_acceptance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py"])
    return module


def report(tmp_path):
    (path,) = tmp_path.iterdir()
    assert path.name == "gpu_acceptance_sham_100.json"
    return json.loads(path.read_text())


def measured(cells, limit, environment):
    """What a step of cells would bring back."""
    return [{"cell": cell.name, **cell._asdict(), **figures_of(cell), "extra_mib": 1.0} for cell in cells]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_device_it_says_so_and_exits_0():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "no GPU to accept: torch sees no CUDA device\n")


@pytest.mark.parametrize(
    ("probe", "reason"),
    [(failed("ImportError: no torch"), "ImportError: no torch"), ({**CARD, "name": None}, "torch sees no CUDA device")],
)
def test_a_torch_that_sees_no_card_is_a_failure_only_beside_one(acceptance, monkeypatch, capsys, probe, reason):
    monkeypatch.setattr(acceptance, "_device", lambda *arguments: probe)
    for nodes, status, found in (([], 0, "no GPU to accept:"), (["/dev/nvidia0"], 1, "a GPU is there, but")):
        monkeypatch.setattr(Path, "glob", lambda self, pattern, nodes=nodes: iter(nodes))
        assert (acceptance.main(), capsys.readouterr().out) == (status, f"{found} {reason}\n")


@pytest.fixture
def sham(acceptance, monkeypatch):
    """A card on which every step goes well; what was asked for."""
    asked = {"limits": [], "tests": [], "sanitizer": []}

    def latency(cells, limit, environment):
        asked["limits"].append(limit)
        return measured(cells, limit, environment)

    def step(name, done):
        return lambda limit, environment: asked[name].append(limit) or dict(done)

    monkeypatch.setattr(acceptance, "_device", lambda *arguments: dict(CARD))
    built = {"status": "ok", "seconds": 20.0, "output": "", "built": True}
    monkeypatch.setattr(gpu_build, "extensions", lambda *arguments: built)
    monkeypatch.setattr(acceptance, "_measured", latency)
    good = {"status": "ok", "seconds": 60.0, "output": "", "counts": {"passed": 700}}
    tools = {tool: {**good, "passed": 9, "errors": 0} for tool in ("memcheck", "racecheck", "initcheck")}
    monkeypatch.setattr(acceptance, "_tests", step("tests", good))
    monkeypatch.setattr(acceptance, "_sanitizer", step("sanitizer", {"status": "ok", "seconds": 180.0, "tools": tools}))
    return asked


def test_everything_is_run_written_and_shown(acceptance, sham, tmp_path, capsys):
    assert acceptance.main() == 0
    written = report(tmp_path)
    names = [cell.name for cell in gpu_cells.named_cells()]
    assert [line["cell"] for line in written["latency"]] == names and 36 <= len(names) <= 48
    functions = [cell.name for cell in gpu_functions.named_cells()]
    assert [line["cell"] for line in written["functions"]] == functions
    packed = [cell.name for cell in gpu_packed.named_cells()]
    assert [line["cell"] for line in written["packed"]] == packed
    assert len(sham["limits"]) == len(tables(gpu_cells.named_cells() + gpu_packed.named_cells())) + 3
    assert set(written["missing_peers"]) == {"faiss", "cuvs", "flashlib", "litetopk"}
    assert all(5 <= limit <= 20 * 60 for limit in sham["limits"])
    assert written["tests"]["counts"] == {"passed": 700}
    assert written["sanitizer"]["tools"]["racecheck"]["errors"] == 0
    assert written["extension"]["built"] is True
    out = capsys.readouterr().out
    assert out.startswith("Sham 100") and all(name in out for name in names + packed + functions)
    assert "racecheck: ok in 60.0 s {'counts': {'passed': 700}, 'passed': 9, 'errors': 0}\n" in out
    assert re.search(r"decay int4 N=5e7 r=128 B=1 M=8 k=1000 +2.000 .* 6.000 +0.180 +2.000\n", out)
    assert re.search(r"encode int8 N=4e6 r=128 +8.000  500 million rows/s, bar 200: met\n", out)


def test_every_step_leaves_later_ones_their_share(acceptance, sham, monkeypatch):
    for only, most in (("latency,packed,functions,tests,sanitizer", (18, 30, 36, 51, 60)), ("packed", (60,) * 5)):
        for limits in sham.values():
            limits.clear()
        monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", "--minutes", "1", "--only", only])
        assert acceptance.main() == 0
        cells = {"latency": gpu_cells, "packed": gpu_packed, "functions": gpu_functions}
        counts = [len(tables(module.named_cells())) * (step in only) for step, module in cells.items()]
        asked = iter(sham["limits"])
        found = [[next(asked) for _ in range(count)] for count in counts] + [sham["tests"], sham["sanitizer"]]
        for limits, share in zip(found, most, strict=True):
            assert all(min(share - 5, 50) <= limit <= share for limit in limits)  # 50: of a table of two cells


def test_steps_that_fail_cost_their_own_figures_only(acceptance, sham, monkeypatch, tmp_path, capsys):
    def latency(cells, limit, environment):
        lines = measured(cells, limit, environment)
        return [
            {**line, "status": "failed: AssertionError: wrong"} if "k=4096" in line["cell"] else line for line in lines
        ]

    monkeypatch.setattr(acceptance, "_measured", latency)
    monkeypatch.setattr(acceptance, "_tests", lambda *arguments: failed("2 failed, 5 passed"))
    assert acceptance.main() == 1
    lines = report(tmp_path)["latency"]
    assert all((line["status"] == "ok") == (line["k"] != 4096) for line in lines)
    assert "failed: AssertionError: wrong" in capsys.readouterr().out


def test_a_packed_cell_that_is_wrong_or_unproven_is_a_failure(acceptance, sham, monkeypatch, tmp_path, capsys):
    words = "failed: 2 users were not proven by the guess"

    def packed(cells, limit, environment):
        lines = measured(cells, limit, environment)
        return [{**line, "status": words} if line.get("M") == 128 else line for line in lines]

    monkeypatch.setattr(acceptance, "_measured", packed)
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", "--only", "packed"])
    assert acceptance.main() == 1
    failing = [line for line in report(tmp_path)["packed"] if line["status"] != "ok"]
    assert {line["M"] for line in failing} == {128} and "latency" not in report(tmp_path)
    out = capsys.readouterr().out
    assert out.count(words) == len(failing) == 5


def test_each_tool_of_the_sanitizer_is_told_what_to_watch_and_counted(acceptance, monkeypatch):
    asked, said = {}, {
        "memcheck": "40 passed in 9.00s\n========= ERROR SUMMARY: 0 errors\n",
        "racecheck": "19 passed in 9.00s\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n",
        "initcheck": "19 skipped in 9.00s\n========= ERROR SUMMARY: 0 errors\n",
    }  # fmt: skip

    def run(command, limit, environment):
        tool = command[2]
        asked[tool] = (command, limit, environment)
        status = "failed (9)" if tool == "racecheck" else "ok"
        return {"status": status, "seconds": 9.0, "output": said[tool]}

    monkeypatch.setattr(acceptance, "_run", run)
    monkeypatch.setattr(acceptance.shutil, "which", lambda name: name)
    done = acceptance._sanitizer(90.0, {})
    assert (done["status"], done["seconds"]) == ("failed (9)", 27.0) and not acceptance._fine(done)
    tools = {tool: (one["status"], one["passed"], one["errors"]) for tool, one in done["tools"].items()}
    assert tools == {
        "memcheck": ("ok", 40, 0), "racecheck": ("failed (9)", 19, 2),
        "initcheck": ("not available: no test could run", 0, 0),
    }  # fmt: skip
    assert asked["memcheck"][1] == pytest.approx(30, abs=1) and asked["initcheck"][1] == pytest.approx(90, abs=1)
    for tool, (command, _, environment) in asked.items():
        assert command[:3] == ["compute-sanitizer", "--tool", tool] and environment["URM_TEST_DEVICE"] == "cuda"
        assert command[command.index("-k") + 1] == ("triton or cuda" if tool == "memcheck" else "cuda")
    said["racecheck"] = "Device not supported"
    done = acceptance._sanitizer(90.0, {})
    assert done["tools"]["racecheck"]["status"].startswith("not available") and acceptance._fine(done)


def test_what_the_sanitizer_watches_is_there(acceptance):
    chosen = [f"python_tests/{name}" for name in acceptance._WATCHED_PACKED]
    command = [sys.executable, "-m", "pytest", *chosen, "-q", "-k", "cuda", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{name}[" in done.stdout for name in chosen)


def test_a_host_without_the_sanitizer_is_no_failure(acceptance, sham, monkeypatch, tmp_path):
    missing = {"status": "not available: no compute-sanitizer on the PATH", "seconds": 0.0, "output": ""}
    monkeypatch.setattr(acceptance, "_sanitizer", lambda *arguments: missing)
    assert acceptance.main() == 0 and report(tmp_path)["sanitizer"] == missing


def test_what_was_measured_is_written_before_the_next_step_runs_and_is_kept_on_request(
    acceptance, sham, monkeypatch, tmp_path
):
    first, second, *_ = tables(gpu_cells.named_cells())

    def latency(cells, limit, environment):
        if cells[0].table == second:
            raise KeyboardInterrupt
        return measured(cells, limit, environment)

    monkeypatch.setattr(acceptance, "_measured", latency)
    with pytest.raises(KeyboardInterrupt):
        acceptance.main()
    kept = report(tmp_path)["latency"]
    assert kept and all((line["N"], line["r"], line["float8"]) == first for line in kept)
    asked = []
    monkeypatch.setattr(acceptance, "_measured", lambda cells, *rest: asked.extend(cells) or measured(cells, *rest))
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", "--resume", "--only", "latency"])
    assert acceptance.main() == 0 and first not in tables(asked)
    assert len(report(tmp_path)["latency"]) == len(gpu_cells.named_cells())


def test_only_the_cells_asked_for(acceptance, sham, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", "--cells", "N=1e6 .*k=10$", "--only", "latency"])
    assert acceptance.main() == 0
    assert {(line["N"], line["k"]) for line in report(tmp_path)["latency"]} == {(10**6, 10)}


def test_a_latency_step_that_ends_early_keeps_what_it_printed(acceptance, monkeypatch):
    cells = gpu_cells.named_cells()[:3]
    line = json.dumps({"cell": cells[0].name, **FIGURES})
    for status, words in (("timed out after 9 s", "timed out"), ("failed (-6)", "failed (-6): about to die")):
        done = {"status": status, "seconds": 9.0, "output": f"{line}\nabout to die\n"}
        monkeypatch.setattr(acceptance, "_step", lambda *arguments, done=done: done)
        found = acceptance._measured(cells, 9.0, {})
        assert [one["status"].startswith("not measured: " + words) for one in found] == [False, True, True]
        assert found[0]["ms"] == 2.0


def test_a_step_that_hangs_is_ended_with_all_that_it_started(acceptance):
    code = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])  # holds the pipe open
print("so far", flush=True)
import time; time.sleep(100)
"""
    began = time.monotonic()
    done = acceptance._run([sys.executable, "-c", code], 2.0, {})
    assert time.monotonic() - began < 20
    assert done["status"] == "timed out after 2 s" and done["output"] == "so far\n"


def test_a_step_that_dies_leaves_its_words(acceptance):
    code = "import os; print('about to die', flush=True); os.abort()"
    done = acceptance._run([sys.executable, "-c", code], 60.0, {})
    assert done["status"] == "failed (-6)" and "about to die" in done["output"]


def test_the_tests_run_on_the_device_and_are_counted(acceptance, monkeypatch):
    seen = {}

    def run(command, limit, environment):
        seen.update(environment, command=command)
        return {"status": "failed (1)", "seconds": 9.0, "output": "= 3 failed, 700 passed, 2 errors in 9.00s ="}

    monkeypatch.setattr(acceptance, "_run", run)
    assert acceptance._tests(60.0, {})["counts"] == {"failed": 3, "passed": 700, "errors": 2}
    assert seen["URM_TEST_DEVICE"] == "cuda" and "python_tests" in seen["command"]


def test_a_wrong_result_is_found_before_it_is_timed():
    items = gpu_cells.decay(5000, 16, 0, 0.4, torch.bfloat16, "cpu")
    queries = gpu_cells.decay(6, 16, 1, 0.0, torch.float32, "cpu").view(2, 3, 16)
    scores, ids = score_topk(queries, items, 11)
    gpu_cells.check(queries, gpu_cells.Table(items), 10, scores[:, :10], ids[:, :10])
    twice = torch.cat([ids[:, :9], ids[:, :1]], 1)
    for wrong, words in (
        ((scores[:, :10], ids[:, :10].flip(1)), "not their rows'"),
        ((scores[:, :10], twice), "returned twice"),
        ((scores[:, 1:], ids[:, 1:]), "better rows are missing"),
        ((scores[:, :10].flip(1), ids[:, :10].flip(1)), "do not descend"),
        ((scores[:, :10], ids[:, :10] - 1), "not their rows'"),
        ((scores[:, :10], ids[:, :10].clone().fill_(5000)), "do not exist"),
    ):
        with pytest.raises(AssertionError, match=words):
            gpu_cells.check(queries, gpu_cells.Table(items), 10, *wrong)


def test_the_torch_line_finds_nearly_the_same():
    items = gpu_cells.decay(5000, 16, 0, 0.4, torch.bfloat16, "cpu")
    queries = gpu_cells.decay(6, 16, 1, 0.0, torch.float32, "cpu").view(2, 3, 16)
    wanted = score_topk(queries, items, 10)
    for held in (1 << 31, 2 * 6 * 700):
        gpu_cells._HELD, before = held, gpu_cells._HELD
        try:
            found = gpu_cells.by_torch(queries, gpu_cells.Table(items), 10)
        finally:
            gpu_cells._HELD = before
        assert torch.allclose(found[0].float(), wanted.scores, rtol=0.02)
        shared = [len(set(a) & set(b)) for a, b in zip(found[1].tolist(), wanted.ids.tolist(), strict=True)]
        assert min(shared) >= 8


def test_float8_tables_are_checked_against_what_their_rows_are():
    items = gpu_cells.decay(5000, 16, 0, 0.4, torch.bfloat16, "cpu")
    queries = gpu_cells.decay(6, 16, 1, 0.0, torch.float32, "cpu").view(2, 3, 16)
    table = gpu_cells.in_float8(items)
    assert float(table.items.float().abs().amax(1).min()) == 448
    assert torch.allclose(table.wide(torch.float32), items.float(), rtol=0.07, atol=0.01)
    scores, ids = score_topk(queries, table.served(), 11)
    gpu_cells.check(queries, table, 10, scores[:, :10], ids[:, :10])
    with pytest.raises(AssertionError, match="better rows are missing"):
        gpu_cells.check(queries, table, 10, scores[:, 1:], ids[:, 1:])


@pytest.mark.parametrize(
    "cell", [cell._replace(N=3000, C=cell.C and 200) for cell in gpu_functions.named_cells()], ids=str
)
def test_functions_are_checked_before_they_are_timed(cell):
    cell = cell._replace(B=min(cell.B, 4))
    items = gpu_cells.decay(cell.N, 16, 0, 0.4, torch.bfloat16, "cpu")
    queries = gpu_cells.decay(cell.B * cell.M, 16, 1, 0.0, torch.float32, "cpu").view(cell.B, cell.M, 16)
    for held in (1 << 26, 5000 * cell.B * cell.M // 4):
        gpu_functions._PART, before = held, gpu_functions._PART
        try:
            work = gpu_functions.work(cell, queries, items, backend="reference")
            found = work.ours()
            work.check(found)
            with pytest.raises(AssertionError, match="is off by"):
                work.check(found + 1e-3 * found.abs().amax())
            assert torch.allclose(work.torch(), found, rtol=1e-4, atol=1e-5)
        finally:
            gpu_functions._PART = before
    assert gpu_functions.floor_ms(cell, {"copy_gb_per_s": 3000.0, "fp32_tflop_per_s": 50.0}) > 0


class Sham:
    """As much of the three libraries as is called, by torch; `find` is replaced by each."""

    METRIC_INNER_PRODUCT = "ip"
    StandardGpuResources = object

    def best(self, queries, rows, k):
        found = (queries.float() @ rows.float().T).topk(k, dim=1)
        return found.values, found.indices.int()

    def knn_gpu(self, resources, queries, rows, k, metric):
        assert metric == "ip" and queries.dtype == rows.dtype == torch.float16
        return self.best(queries, rows, k)

    def build(self, rows, metric):
        assert metric == "inner_product"
        return rows

    def search(self, index, queries, k):
        return self.best(queries, index, k)

    def flash_knn(self, queries, rows, k):
        distances = torch.cdist(queries.float(), rows.float()) ** 2
        found = distances.topk(k, dim=1, largest=False)
        return found.values, found.indices.int()


def test_other_libraries_are_asked_for_every_query_and_merged(monkeypatch):
    for name in ("faiss", "faiss.contrib", "faiss.contrib.torch_utils", "cuvs", "cuvs.neighbors",
                 "cuvs.neighbors.brute_force", "flashlib"):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, Sham())
    modules, missing = gpu_peers.installed()
    assert set(modules) == set(gpu_peers.PEERS) and set(missing) == {"litetopk"}
    rows, queries = torch.randn(400, 16).half(), torch.randn(3, 5, 16).half().float()
    wanted = score_topk(queries, rows, 9)
    for name in ("faiss", "cuvs"):
        scores, ids = gpu_peers.merged(gpu_peers.PEERS[name].prepare(modules[name], rows), queries, 9)
        assert torch.equal(ids, wanted.ids) and torch.allclose(scores, wanted.scores, rtol=1e-5)
    _, ids = gpu_peers.merged(gpu_peers.PEERS["flashlib"].prepare(modules["flashlib"], rows), queries[:, :1], 1)
    assert ids[:, 0].tolist() == torch.cdist(queries[:, 0], rows.float()).argmin(1).tolist()


def test_a_library_that_fails_or_lacks_its_gpu_part_costs_its_own_figure_only(monkeypatch):
    class Broken(Sham):
        def build(self, rows, metric):
            raise KeyError("no such metric")

    monkeypatch.setattr(gpu_peers, "installed", lambda: ({"cuvs": Broken(), "flashlib": Sham()}, {}))
    monkeypatch.setattr(gpu_cells, "milliseconds", lambda call: call(0) and 1.5)
    queries, table = torch.randn(2, 3, 16), gpu_cells.Table(torch.randn(50, 16).bfloat16())
    found = gpu_cells.other_libraries(queries, table, 4)
    assert found == {"cuvs": "failed: KeyError: 'no such metric'", "flashlib": 1.5}
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "faiss", object())
    assert gpu_peers.installed()[1]["faiss"] == "faiss is installed without its GPU part"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_benchmarks_on_a_gpu_are_collected_by_name_only_and_skip_without_one():
    collect = [sys.executable, "-m", "pytest", "bench", "-q", "-rs", "-p", "no:cacheprovider"]
    root = SCRIPT.parents[1]
    there = {**os.environ, "DEVICE": "cuda"}
    done = subprocess.run(collect, capture_output=True, text=True, cwd=root, env=there, timeout=120)
    assert done.returncode == 0 and "torch sees no CUDA device" in done.stdout, done.stdout + done.stderr
    assert "passed" not in done.stdout and re.search(r"\b1\d skipped|\b2\d skipped", done.stdout)
    here = subprocess.run([*collect, "--collect-only"], capture_output=True, text=True, cwd=root, timeout=120)
    assert "test_latency.py" in here.stdout and "test_gpu.py" not in here.stdout


def test_a_line_of_the_benchmark_names_the_fastest_peer():
    import test_gpu

    cell = gpu_functions.named_cells()[0]
    figures = {**FIGURES, "extra_mib": 0.5, "peers_ms": {"torch": 3.0, "half_fused": 2.0, "cuvs": "failed: KeyError"}}
    line = test_gpu._line(cell, figures)
    assert (line["best_peer"], line["faster_by"], line["device_ms"], line["extra_bytes"]) == (
        "half_fused", 1.33, 1.5, 2**19,
    )  # fmt: skip
    assert test_gpu._line(cell, {**figures, "graph_ms": None})["device_ms"] == 2.0


def test_what_was_measured_is_rendered():
    import render_gpu

    cells = [{"cell": cell.name, **cell._asdict(), **FIGURES} for cell in gpu_cells.named_cells()]
    functions = [{"cell": cell.name, **cell._asdict(), **FIGURES} for cell in gpu_functions.named_cells()]
    functions[-1] = {**functions[-1], "graph_ms": None}
    packed = [{"cell": cell.name, **cell._asdict(), **figures_of(cell)} for cell in gpu_packed.named_cells()]
    device = {"cuda": "13.0", "triton": "3.6.0", **CARD}
    record = {"device": device, "latency": cells, "packed": packed, "functions": functions}
    text, figures = render_gpu.latency(record, "some.json")
    row = "| decay | int4 | 50,000,000 | (1, 8) | **1.50** | 2.00 | 1.00 | 0.70 | 6.00 | 4.00 | 0.180 % | 2.0 |"
    assert row in text.splitlines()
    assert "Encoding, int8: 500 million rows a second." in text
    assert text.count("### N = ") == 3 and "### float8 with a scale a row" in text
    assert "| score_candidates | 50,000,000 | (64, 8) | 1,000, shared | **1.50** |" in text
    assert "| gradient | 1,000,000 | (8, 16) | - | **-** | 2.00 |" in text
    panels, _ = figures["bench_gpu.png"]
    assert len(panels) == 4  # a table of float8 is none of them


def test_cells_have_names_of_their_own_and_the_product_holds_every_size():
    # A step's process looks for its names in all modules.
    others = gpu_packed.named_cells() + gpu_functions.named_cells()
    for cells in (gpu_cells.named_cells() + others, gpu_cells.all_cells() + others):
        assert len({cell.name for cell in cells}) == len(cells)
    assert len(gpu_cells.all_cells()) == 108


def test_extensions_are_built_for_the_card_where_they_are_not_there(monkeypatch):
    ran = []

    def run(command, limit, environment):
        ran.append(command)
        there = {"status": "ok", "seconds": 7.0, "output": ""}
        return {**there, "status": "failed (1)"} if "-c" in command else there

    monkeypatch.setattr(gpu_build.shutil, "which", lambda name: f"/bin/{name}")
    done = gpu_build.extensions(run, 100, {})
    assert done["built"] and done["seconds"] == 14.0
    configure, build = ran[1:]
    assert configure[0] == build[0] == "cmake" and "-DCMAKE_CUDA_ARCHITECTURES=native" in configure
    assert any(word.endswith("urm_kernels") and "LIBRARY_OUTPUT" in word for word in configure)
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name: None)
    done = gpu_build.extensions(run, 100, {})
    assert done["status"] == "not available: no cmake, nvcc" and not done["built"]
    done = gpu_build.extensions(lambda *arguments: {"status": "ok", "seconds": 1.0, "output": ""}, 100, {})
    assert done["status"] == "ok" and not done["built"]
