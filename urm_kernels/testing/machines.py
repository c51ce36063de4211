"""Which backends, instruction sets and devices can be tested here, and how to force one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ..backends import cpu, select


def available_backends(device: str | torch.device = "cpu") -> list[tuple[str, str | None]]:
    """(backend, instruction set or None) for float32 on `device`; the first is what a plain call takes."""
    pairs: list[tuple[str, str | None]] = []
    for name, backend in select.BACKENDS.items():
        if backend.why_not(torch.device(device), {torch.float32}) is not None:
            continue
        pairs += [(name, isa) for isa in (cpu.extension().instruction_sets() if name == "cpu" else (None,))]
    return pairs


@contextlib.contextmanager
def forced(backend: str | None, isa: str | None = None, scan: str | None = None) -> Iterator[None]:
    """Within, calls run on that backend and instruction set, and the CPU scans in that way ("exact" or "bounded").

    None leaves the choice open. Not safe across threads.
    """
    wanted = {"URM_BACKEND": backend, "URM_CPU_ISA": isa, "URM_CPU_SCAN": scan}
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def devices() -> list[torch.device]:
    """The devices to test on: the one URM_TEST_DEVICE names, else the CPU and, where there is one, the GPU."""
    named = os.environ.get("URM_TEST_DEVICE")
    if named:
        return [torch.device(named)]
    return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
