"""What several test files need: calls spelled short, bits compared, Python in a process of its own."""

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import packed_calls
import pytest
import torch

import urm_kernels
from urm_kernels import score_topk, testing
from urm_kernels.backends import cpu
from urm_kernels.testing import available_backends, compare_topk, forced

REDUCTIONS = ("max", "sum", "mean", "logsumexp")
CODES = (("int4",), ("int8",), ("int4", "int8"), ("int2", "int4"))
HALVES = (torch.float32, torch.float16, torch.bfloat16)
PACKAGE_ROOT = str(Path(urm_kernels.__file__).resolve().parents[1])
INF, NAN = float("inf"), float("nan")


def by_reference(queries, items, k, **options):
    """The specification's answer, on the CPU."""
    with forced("reference"):
        return score_topk(queries, items, k, **options)


def assert_same_bits(result, expected, sorted=True):
    compare_topk(result, type(expected)(*expected), sorted=sorted)


def ids_of(result):
    return result.ids.tolist()


def bits(scores):
    return scores.detach().cpu().contiguous().view(torch.int32)


def packed(mask):
    """bool [..., N] -> bitset, lowest bit first."""
    width = -(-mask.shape[-1] // 8) * 8
    wide = torch.zeros(*mask.shape[:-1], width, dtype=torch.uint8)
    wide[..., : mask.shape[-1]] = mask
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (wide.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def run_python(code, timeout=60, **environment):
    """Runs `code` in a fresh interpreter; fails with what it said. Returns its standard output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("URM_")}
    env["PYTHONPATH"] = PACKAGE_ROOT
    env.update(environment)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout, env=env
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def with_ceilings(monkeypatch, ceilings):
    """For tests of benchmarks, which need the CPU backend: rates by name that nobody has to wait for."""
    reason = cpu.why_not(torch.device("cpu"), set())
    if reason is not None:
        pytest.skip(f"the cpu backend cannot run here: {reason}")
    for name, value in ceilings.items():
        monkeypatch.setattr(testing, name, lambda rounds, value=value: value)


@contextlib.contextmanager
def on_machine(isa, scan, threads, monkeypatch):
    """Calls take an instruction set of the cpu backend, a way to scan and so many threads; or, for "cuda", the CUDA
    kernels as they run without a GPU."""
    if isa == "cuda":
        if reason := packed_calls.why_not(torch.device("cpu")):
            pytest.skip(reason)
        with packed_calls.packed_calls(None, torch.device("cpu")):
            yield
        return
    if ("cpu", isa) not in available_backends():
        pytest.skip(f"cpu/{isa} cannot run on this machine")
    monkeypatch.setenv("URM_NUM_THREADS", threads)
    with forced("cpu", isa, scan):
        yield
