"""What this machine has, what the library will use, and why not the rest: a report to paste into an issue."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable

import torch

from . import scoring
from .backends import cpu, select
from .testing import available_backends, forced

SETTINGS = {
    "URM_BACKEND": "backend of calls that name none: " + ", ".join(select.BACKENDS),
    "URM_CPU_ISA": "instruction set of the cpu backend, one of those listed above",
    "URM_CPU_SCAN": "how the cpu backend scores: auto, exact, bounded (cheap scores or codes first); same result",
    "URM_NUM_THREADS": "threads of the cpu backend, exactly; default: torch.get_num_threads(), fewer for small calls",
}


def report() -> str:
    """Versions, processor, devices, backends with reasons, settings and a self-check of about a second."""
    sections = {
        "versions": _versions(),
        "processor": _processor(),
        "devices": _devices(),
        "backends": select.describe(),
        "settings": [(name, f"{os.environ.get(name) or '(not set)'}  # {text}") for name, text in SETTINGS.items()],
        "self-check": self_check(),
    }
    width = max(len(name) for lines in sections.values() for name, _ in lines)
    text = []
    for title, lines in sections.items():
        text += [f"{title}:", *(f"  {name:<{width}}  {value}" for name, value in lines), ""]
    return "\n".join(text)


def _versions() -> list[tuple[str, str]]:
    lines = [("urm_kernels", _version("urm-kernels")), ("python", platform.python_version())]
    lines += [(name, _version(name)) for name in ("torch", "triton", "numpy", "safetensors", "cupy", "transformers")]
    return lines


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> list[tuple[str, str]]:
    lines = [("model", _processor_model()), ("system", f"{platform.system()} {platform.machine()}")]
    if cpu.why_not(torch.device("cpu"), set()) is None:
        lines.append(("instruction sets", ", ".join(cpu.extension().instruction_sets())))
        lines.append(("chosen", _in_words(cpu.instruction_set)))
        lines.append(("threads", _in_words(lambda: str(cpu.threads()))))
    return lines


def _in_words(value: Callable[[], str]) -> str:
    """The value, or what is wrong with the setting that it comes from: a report must not stop at a typing error."""
    try:
        return value()
    except ValueError as error:
        return str(error)


def _processor_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _devices() -> list[tuple[str, str]]:
    lines = [("cuda (torch)", _torch_cuda())]
    try:
        runtime, driver, devices, problem = importlib.import_module("urm_kernels._cuda").report()
        lines.append(("cuda (extension)", f"runtime {runtime}, driver {driver}, {problem or f'{devices} devices'}"))
    except ImportError as error:
        lines.append(("cuda (extension)", f"not built ({error})"))
    return lines


def _torch_cuda() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return f"torch was built for CUDA {built}, no usable device" if built else "torch is a build without CUDA"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def self_check() -> list[tuple[str, str]]:
    """Every usable backend and instruction set against the reference, bit for bit, and a timing of the one chosen."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 5, 48, generator=generator)
    items = torch.randn(5000, 48, generator=generator)  # enough for a bounded scan
    wanted = scoring.score_topk(queries, items, 20, backend="reference")
    lines = []
    for place in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for backend, isa in available_backends(place):
            with forced(backend, isa):
                got = scoring.score_topk(queries.to(place), items.to(place), 20)
            same = all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))
            name = "/".join(filter(None, (backend, isa, None if place == "cpu" else place)))
            lines.append((name, "bits equal the reference's" if same else "DIFFERS FROM THE REFERENCE"))
    return [*lines, ("speed", _in_words(_speed))]


def _speed() -> str:
    many, queries = torch.randn(200_000, 64), torch.randn(1, 8, 64)
    begin = time.perf_counter()
    scoring.score_topk(queries, many, 100)
    return f"200,000 items, r=64, M=8, k=100: {1e3 * (time.perf_counter() - begin):.1f} ms (chosen backend, one call)"
