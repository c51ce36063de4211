"""What nvcc and the assembler make of csrc/cuda, without a GPU: registers, spills and instructions of every kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from compile_only import TOOLS, loops_of

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ("80", "90a", "100a")  # as CMakeLists.txt has them
_TELLING = ("IMMA", "LDG.E.128", "LDS.128", "VIMNMX3", "IDP", "FFMA", "SHFL", "ATOM", "RED", "STL", "LDL")


class Compiled(NamedTuple):
    """Of one kernel: registers and bytes of stack a thread, spilled bytes, counts of instructions.

    product_loop: instructions of the smallest loop with a product on the tensor cores, 0 where there is none.
    """

    name: str
    registers: int
    stack: int
    spilled: int
    instructions: dict[str, int]
    product_loop: int


def nvcc() -> str | None:
    return shutil.which("nvcc")


def compiled(architecture: str) -> list[Compiled]:
    """Every kernel, compiled with the flags of CMakeLists.txt."""
    found = nvcc()
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [found, "-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "--Werror=all-warnings", "-cubin"]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-o", str(cubin)]
        told = _run([*command, str(SOURCES / "cuda" / "kernels.cu")]).stderr
        code = _run([str(TOOLS / "nvdisasm"), "-c", str(cubin)]).stdout
    bodies = {}
    for part in re.split(r"\.section\s+\.text\.", code)[1:]:
        bodies[part.split(",", 1)[0].strip()] = part
    return [_read(symbol, *numbers, bodies[symbol]) for symbol, *numbers in _USED.findall(told)]


_USED = re.compile(
    r"Compiling entry function '(\S+)'.*\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\n.*Used (\d+) registers"
)


def _read(symbol: str, stack: str, stores: str, loads: str, registers: str, body: str) -> Compiled:
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", body)) for name in _TELLING}
    return Compiled(
        _readable(symbol),
        int(registers),
        int(stack),
        int(stores) + int(loads),
        {name: count for name, count in counts.items() if count},
        min(loops_of(body, holding="IMMA"), default=0),
    )


def _readable(symbol: str) -> str:
    """scan_codes<4, 2, true> of a mangled name."""
    length = re.match(r"_ZN3urm(\d+)", symbol)
    assert length is not None
    start = length.end()
    name, rest = symbol[start : start + int(length[1])], symbol[start + int(length[1]) :]
    values = [
        value if kind == "i" else ("false", "true")[int(value)] for kind, value in re.findall(r"L([ib])(\d+)E", rest)
    ]
    return f"{name}<{', '.join(values)}>" if values else name


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr[-2000:]}")
    return done
