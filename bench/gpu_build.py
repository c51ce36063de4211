"""The extensions, built for the card at hand where they are not there: a step of the GPU acceptance run."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_IMPORTS = "import urm_kernels._cpu, urm_kernels._cuda; assert hasattr(urm_kernels._cuda, 'byte_products')"

Run = Callable[[list[str], float, dict[str, str]], dict[str, Any]]


def commands() -> list[list[str]]:
    """Into the package's folder, for this Python and this card alone."""
    found = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True)
    folder = str(ROOT / "build" / "acceptance")
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_ARCHITECTURES": "native",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": ROOT / "urm_kernels",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": found.stdout.strip(),
    }
    configure = ["cmake", "-S", str(ROOT), "-B", folder, *(f"-D{name}={value}" for name, value in settings.items())]
    return [configure, ["cmake", "--build", folder, "--parallel"]]


def extensions(run: Run, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """What came of it. Without a compiler the kernels are left to CuPy, which is no failure."""
    done = run([sys.executable, "-c", _IMPORTS], limit, environment)
    if done["status"] == "ok":
        return {**done, "status": "ok", "built": False}
    missing = [name for name in ("cmake", "nvcc") if shutil.which(name) is None]
    missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    if missing:
        return {**done, "status": f"not available: no {', '.join(missing)}", "built": False}
    seconds = 0.0
    for command in commands():
        done = run(command, limit - seconds, environment)
        seconds += done["seconds"]
        if done["status"] != "ok":
            break
    return {**done, "seconds": round(seconds, 1), "built": done["status"] == "ok"}
