"""Launches without a GPU: the real pipeline on tensors without memory, every kernel compiled for a named target.

Triton needs no device to compile. A stand-in for its driver names the target, and a launch becomes a compilation that
is written down with its grid. Registers, shared memory, spills and instructions are read from the machine code.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """One launch; constants are the kernel's constexpr arguments and its warps."""

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, Any]
    compiled: Any


class _Driver:
    """As much of Triton's driver as compiling needs; a device number a target, since caches are kept by device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_device_interface(self) -> SimpleNamespace:
        return SimpleNamespace()

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextlib.contextmanager
def recorded(architecture: int) -> Iterator[list[Launch]]:
    """Inside, launches of Triton kernels are compiled for sm_`architecture` and listed instead of run."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_and_note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = {name: value for name, value in kwargs.items() if name.isupper() or name == "num_warps"}
        launches.append(Launch(self.__name__, tuple(grid), constants, compiled))
        return compiled

    driver.set_active(_Driver(architecture))
    JITFunction.run = compile_and_note
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver.set_active(None)


class Resources(NamedTuple):
    """Of one kernel: registers a thread, bytes of stack a thread, bytes of shared memory, counts of instructions.

    loops: instructions of each loop, those of loops within it included.
    """

    registers: int
    stack: int
    shared: int
    spills: int
    instructions: dict[str, int]
    loops: list[int]


# What shows which unit does the work: matrix products, copies that skip the registers, spills.
_TELLING = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA", "LDGSTS", "UTMALDG", "LDG.E.128", "ATOMG", "STL", "LDL")


_LOOP = 30  # instructions


def resources(launch: Launch) -> Resources:
    """Read from the machine code by the tools in Triton's own package."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    found = {name: len(re.findall(rf"\b{re.escape(name)}", code)) for name in _TELLING}
    spills = found["STL"] + found["LDL"]
    told = {name: n for name, n in found.items() if n}
    return Resources(registers, stack, launch.compiled.metadata.shared, spills, told, loops_of(code))


def loops_of(code: str, holding: str = "") -> list[int]:
    """Instructions from a label to each branch back to it, of loops that have an instruction `holding`; loops that only
    copy or wait are left out."""
    labels: dict[str, int] = {}
    found, count, held = [], 0, []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s", line):
            held.append(holding in line)
            count += 1
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels and count - labels[back[1]] >= _LOOP and any(held[labels[back[1]] :]):
                found.append(count - labels[back[1]])
    return found


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
