"""What a reader needs to judge figures: the machine and the versions; no name of a host or a folder."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import env
from ..backends import cpu

PACKAGES = ("torch", "numpy", "faiss-cpu", "jax")


def machine() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": env._processor_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def device() -> dict[str, Any]:
    """The CUDA device that calls run on."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    return {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_gib": round(found.total_memory / 2**30, 1),
        "processors": found.multi_processor_count,
        "versions": versions | {name: metadata.version(name) for name in ("torch", "triton")},
        "date": datetime.date.today().isoformat(),
    }


def own_version() -> str:
    try:
        return metadata.version("urm-kernels")
    except metadata.PackageNotFoundError:
        return "not installed"


def commit_of(folder: Path) -> str:
    """Of a checkout; "unknown" where there is none."""
    run = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def free_bytes() -> int | None:
    """Memory that can be had without swapping (Linux); None where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
