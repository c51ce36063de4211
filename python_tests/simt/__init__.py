"""The CUDA kernels on a machine without a GPU: csrc/cuda compiled as C++, every thread a fiber (simt.h)."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE.parents[1] / "csrc"
_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
_FLAGS += ["-DURM_SIMT", "-include", str(_HERE / "simt.h")]


def why_not():
    """Why kernels cannot run this way here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "fibers are written for x86-64"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None


class Launcher:
    """See urm_kernels.backends.cuda.launching.Launcher."""

    def __init__(self, library):
        self._launch = library.urm_launch
        self._launch.argtypes = [ctypes.c_char_p, *[ctypes.c_int64] * 4, ctypes.c_void_p]
        self._launch.restype = ctypes.c_char_p

    def launch(self, name, grid, threads, shared, arguments):
        held = [(ctypes.c_int64 * len(words))(*words) for words in arguments]
        addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        problem = self._launch(name.encode(), *grid, threads, shared, addresses)
        if problem is not None:
            raise RuntimeError(f"{name}: {problem.decode()}")


@functools.cache
def launcher():
    """Compiled at the first call, kept for as long as no source changes."""
    sources = sorted([*_SOURCES.glob("c*/*.h"), *_HERE.glob("*.h"), *_HERE.glob("*.cc")])
    state = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = Path(os.environ.get("URM_TEST_SIMT") or Path(tempfile.gettempdir()) / f"urm_simt_{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    built = folder / f"kernels_{state}.so"
    if not built.exists():
        partial = folder / f"{os.getpid()}.so"
        subprocess.run(["g++", *_FLAGS, "-o", partial, _HERE / "kernels.cc"], check=True)
        partial.replace(built)
    return Launcher(ctypes.CDLL(str(built)))
