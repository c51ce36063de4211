"""Fixtures: a device, and every backend, instruction set and way to scan in turn."""

import os

import pytest
import torch
from hypothesis import settings

from urm_kernels.backends import select
from urm_kernels.testing import available_backends, devices, forced

settings.register_profile("urm", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("urm")

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
CHEAP_SCORES = ("avx512_vnni", "amx")  # the kernels of avx512, with a cheap score to bound by
# Small tables are scanned exactly unless a bounded scan is forced.
MACHINES = [("cpu", isa, "exact") for isa in INSTRUCTION_SETS] + [("cpu", isa, "bounded") for isa in CHEAP_SCORES]
MACHINES += [(name, None, None) for name in select.BACKENDS if name != "cpu"]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than 5 s; runs with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    """Every test starts from one seed, with no URM_ setting but the test device, with denormals."""
    for name in [n for n in os.environ if n.startswith("URM_") and n != "URM_TEST_DEVICE"]:
        if not name.startswith("URM_EMBEDDINGS_"):
            monkeypatch.delenv(name)
    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def device():
    return devices()[-1] if os.environ.get("URM_TEST_DEVICE") else torch.device("cpu")


@pytest.fixture(params=MACHINES, ids=lambda machine: "/".join(filter(None, machine)))
def machine(request, device):
    """(backend, instruction set, way to scan), forced for the test."""
    if request.param[:2] not in available_backends(device):
        pytest.skip(f"{'/'.join(filter(None, request.param))} cannot run on {device} of this machine")
    with forced(*request.param):
        yield request.param


@pytest.fixture(params=CHEAP_SCORES)
def cheap_isa(request):
    """An instruction set that bounded scans can use here."""
    if ("cpu", request.param) not in available_backends():
        pytest.skip(f"cpu/{request.param} cannot run on this machine")
    return request.param


@pytest.fixture(params=["cpu", "reference"])
def backend(request, device):
    """The backends by name, each with its best instruction set."""
    if request.param not in [name for name, _ in available_backends(device)]:
        pytest.skip(f"{request.param} cannot run on {device} of this machine")
    return request.param
