"""The GPU acceptance command without a GPU: steps that fail or hang, what is written, each step run on a sham card."""

import importlib.util
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_acceptance.py"
CARD = {"status": "ok", "seconds": 1.0, "name": "Sham 100", "capability": "9.0", "memory_gib": 80.0, "torch": "2"}
FIGURES = {"ms": 2.0, "torch_fp32_ms": 3.0, "torch_same_dtype_ms": 1.0, "gb_per_s": 5.0, "backend": "reference"}


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


def figures_of(step):
    """What a step would print: the card, or one good figure."""
    name, _, index = step.partition(":")
    return (
        dict(CARD) if name == "device" else {"status": "ok", "seconds": 0.5, **(FIGURES if index else {"bf16": 700.0})}
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_device_it_says_so_and_exits_0():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "no GPU to accept: torch sees no CUDA device\n")


@pytest.mark.parametrize(
    ("probe", "reason"),
    [(failed("ImportError: no torch"), "ImportError: no torch"), ({**CARD, "name": None}, "torch sees no CUDA device")],
)
def test_a_torch_that_sees_no_card_is_a_failure_only_beside_one(acceptance, monkeypatch, capsys, probe, reason):
    monkeypatch.setattr(acceptance, "_measure", lambda *arguments: probe)
    for nodes, status, found in (([], 0, "no GPU to accept:"), (["/dev/nvidia0"], 1, "a GPU is there, but")):
        monkeypatch.setattr(Path, "glob", lambda self, pattern, nodes=nodes: iter(nodes))
        assert (acceptance.main(), capsys.readouterr().out) == (status, f"{found} {reason}\n")


def test_everything_is_run_written_and_shown(acceptance, monkeypatch, tmp_path, capsys):
    limits = {}

    def measure(step, limit, environment):
        limits[step] = limit
        return figures_of(step)

    def tests(limit, environment):
        limits["tests"] = limit
        return {"status": "ok", "seconds": 60.0, "output": "", "counts": {"passed": 700}}

    monkeypatch.setattr(acceptance, "_measure", measure)
    monkeypatch.setattr(acceptance, "_tests", tests)
    assert acceptance.main() == 0
    written = report(tmp_path)
    assert len(acceptance.CELLS) == len(written["latency"]) == 10
    assert set(limits) == {"device", "ceilings", "tests", *(f"latency:{cell}" for cell in range(10))}
    assert all(5 <= limit <= 20 * 60 for limit in limits.values())
    assert written["tests"]["counts"] == {"passed": 700} and written["ceilings"]["bf16"] == 700.0
    out = capsys.readouterr().out
    assert out.startswith("Sham 100") and all(cell.name in out for cell in acceptance.CELLS)


def test_steps_that_fail_cost_their_own_figures_only(acceptance, monkeypatch, tmp_path, capsys):
    def measure(step, limit, environment):
        return failed(f"{step} broke") if step in ("ceilings", "latency:3") else figures_of(step)

    monkeypatch.setattr(acceptance, "_measure", measure)
    monkeypatch.setattr(acceptance, "_tests", lambda *arguments: failed("2 failed, 5 passed"))
    assert acceptance.main() == 1
    written = report(tmp_path)
    assert written["ceilings"]["output"].endswith("ceilings broke\n")
    assert [cell["status"] == "ok" for cell in written["latency"]] == [place != 3 for place in range(10)]
    assert "failed (1): latency:3 broke" in capsys.readouterr().out


def test_what_was_measured_is_written_before_the_next_step_runs(acceptance, monkeypatch, tmp_path):
    def measure(step, limit, environment):
        if step == "latency:2":
            raise KeyboardInterrupt
        return figures_of(step)

    monkeypatch.setattr(acceptance, "_measure", measure)
    with pytest.raises(KeyboardInterrupt):
        acceptance.main()
    assert len(report(tmp_path)["latency"]) == 2


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


@pytest.fixture
def sham_card(monkeypatch):
    """The CPU under torch.cuda's names, as far as the steps use them."""
    properties = types.SimpleNamespace(
        name="Sham 100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=1
    )
    for name, value in {
        "is_available": lambda: True,
        "get_device_properties": lambda index: properties,
        "synchronize": lambda: None,
        "mem_get_info": lambda: (32 << 20, 80 << 30),
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 3 << 20,
        "reset_peak_memory_stats": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    for name in ("ones", "randn"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, made=made, device=None, **given: made(*size, **given))


def test_the_steps_measure_what_the_table_shows(acceptance, sham_card, monkeypatch):
    monkeypatch.setattr(acceptance, "_PRODUCT", 64)
    monkeypatch.setattr(acceptance, "CELLS", [cell._replace(N=2000, B=min(cell.B, 2)) for cell in acceptance.CELLS])
    assert {"name", "capability", "memory_gib", "torch"} <= set(acceptance.step_device())
    ceilings = acceptance.step_ceilings()
    assert set(ceilings) == {"copy_gb_per_s", "bf16_tflop_per_s", "fp32_tflop_per_s"} and ceilings["copy_gb_per_s"] > 0
    for place in range(10):
        done = acceptance.step_latency(place)
        assert set(FIGURES) <= set(done) and done["ms"] > 0 and done["extra_mib"] == 3.0


def test_a_wrong_result_is_no_figure(acceptance, sham_card, monkeypatch):
    import urm_kernels

    def wrong(queries, items, k):
        scores, ids = honest(queries, items, k)
        return scores, ids.flip(1)

    honest = urm_kernels.score_topk
    monkeypatch.setattr(urm_kernels, "score_topk", wrong)
    with pytest.raises(AssertionError, match="user 0"):
        acceptance.step_latency(9)
