"""Where kernels come from, and how one is launched: by name, with a list of integers and structs of integers.

csrc/cuda/arguments.h says what kernels take. Nothing here is loaded before the first call on a GPU.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

Words = tuple[int, ...]  # of one argument: a number, an address, or the members of a struct

_PACKAGE = Path(__file__).resolve().parents[2]
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3}


class Launcher(Protocol):
    def launch(self, name: str, grid: tuple[int, int], threads: int, shared: int, arguments: list[Words]) -> None:
        """Runs a kernel on the current device and stream: grid of blocks, threads and bytes of shared memory each."""


class Extension:
    """Kernels that nvcc compiled into ``urm_kernels._cuda``."""

    def __init__(self, module: ModuleType) -> None:
        self._launch = module.launch

    def launch(self, name: str, grid: tuple[int, int], threads: int, shared: int, arguments: list[Words]) -> None:
        self._launch(name, *grid, threads, shared, torch.cuda.current_stream().cuda_stream, arguments)


CODE = '#include "cuda/kernels.h"\n'


def options(sources: Path) -> tuple[str, ...]:
    """Of NVRTC: products and sums are rounded one by one, except by the explicit fma, as the promise of bits wants."""
    return ("-std=c++17", "--fmad=false", f"-I{sources}")


class RuntimeCompiled:
    """Kernels that CuPy compiles with NVRTC, each at its first launch on a device; CuPy keeps them in its cache."""

    def __init__(self, cupy: ModuleType, sources: Path) -> None:
        self._cupy, self._sources = cupy, sources

    @functools.cache  # noqa: B019 (the one launcher of a process lives as long)
    def _kernel(self, name: str, device: int) -> Any:
        module = self._cupy.RawModule(code=CODE, options=options(self._sources), name_expressions=(name,))
        kernel = module.get_function(name)
        kernel.max_dynamic_shared_size_bytes = self._cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]
        return kernel

    def launch(self, name: str, grid: tuple[int, int], threads: int, shared: int, arguments: list[Words]) -> None:
        import numpy as np

        device, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
        # Arrays of one element are handed over by value.
        values = tuple(np.array(words, np.int64).view(np.dtype(("V", 8 * len(words)))) for words in arguments)
        with self._cupy.cuda.Device(device), self._cupy.cuda.ExternalStream(stream, device):
            self._kernel(name, device)(grid, (threads,), values, shared_mem=shared)


_stand_in: Launcher | None = None


def install_stand_in(launcher: Launcher | None) -> None:
    """For tests: CPU tensors are taken, and kernels launched by this."""
    global _stand_in
    _stand_in = launcher


def stand_in(device: torch.device) -> Launcher | None:
    return _stand_in if device.type == "cpu" else None


def sources() -> Path | None:
    """The folder of the kernels' sources: in the package or, in a working tree, beside it."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "cuda" / "kernels.h").exists():
            return folder
    return None


@functools.cache
def _found() -> tuple[Launcher | None, str]:
    """(launcher, "") or (None, the reason why there is none)."""
    try:
        module = importlib.import_module("urm_kernels._cuda")
        problem = module.report()[3]
        if not problem:
            return Extension(module), ""
        reasons = f"the CUDA extension finds no device ({problem})"
    except ImportError as error:
        reasons = f"the CUDA extension was not built or does not load ({error})"
    try:
        cupy = importlib.import_module("cupy")
        folder = sources()
        if folder is not None:
            return RuntimeCompiled(cupy, folder), ""
        reasons += "; CuPy is there, but not the kernels' sources"
    except ImportError as error:
        reasons += f", nor does CuPy ({error})"
    return None, reasons


def why_not(device: torch.device) -> str | None:
    return None if stand_in(device) is not None else _found()[1] or None


def launcher(device: torch.device) -> Launcher:
    found = stand_in(device) or _found()[0]
    assert found is not None
    return found


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def column(vector: Tensor | None) -> Words:
    """struct Column."""
    return (0, 0, 0) if vector is None else (vector.data_ptr(), _TYPES[vector.dtype], vector.stride(0))


def table_words(items: Tensor, bias: Tensor | None, row_scale: Tensor | None) -> Words:
    """struct Table."""
    return (items.data_ptr(), _TYPES[items.dtype], *items.shape, *items.stride(), *column(bias), *column(row_scale))
