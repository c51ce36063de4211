"""Fixtures: a device, and every backend, instruction set and way to scan in turn."""

import os
import zlib

import packed_calls
import pytest
import torch
from hypothesis import settings
from support import CODES

from urm_kernels.backends import select
from urm_kernels.testing import available_backends, forced

settings.register_profile("urm", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("urm")

DEVICE = os.environ.get("URM_TEST_DEVICE") or "cpu"
if DEVICE == "stand_in":
    import stand_in

    _REGISTERED = stand_in.register()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import triton_interpreter  # noqa: F401

collect_ignore = ["test_device.py"] if DEVICE == "cpu" else []

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
CELLS = (0, 64, 0, 32)  # rows of a cell on "cuda"
CHEAP_SCORES = ("avx512_vnni", "amx")  # the kernels of avx512, with a cheap score to bound by
BACKENDS = [name for name in select.BACKENDS if name != "cpu" or DEVICE == "cpu"]
if DEVICE != "cuda" and not INTERPRETED:
    BACKENDS.remove("triton")
BACKENDS.remove("cuda")  # for packed tables only: a machine of its own
MACHINES = [(name, None, None) for name in BACKENDS if name != "cpu"]
if DEVICE == "cpu":
    # Small tables are scanned exactly unless a bounded scan is forced.
    MACHINES += [("cpu", isa, "exact") for isa in INSTRUCTION_SETS]
    MACHINES += [("cpu", isa, "bounded") for isa in CHEAP_SCORES]
if DEVICE != "stand_in" and not INTERPRETED:
    MACHINES += [("cuda", None, "packed")]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than 5 s; runs with -m slow")
    config.addinivalue_line("markers", "real_device: asks for what the stand-in device has not")


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            return False
        if DEVICE == "stand_in" and item.get_closest_marker("real_device"):
            return False
        # What takes no device has nothing new to show on another one.
        return DEVICE == "cpu" or "device" in item.fixturenames

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    """Every test starts from one seed, with no URM_ setting but the test device, with denormals."""
    for name in [n for n in os.environ if n.startswith("URM_") and n != "URM_TEST_DEVICE"]:
        if not name.startswith(("URM_EMBEDDINGS_", "URM_TRITON_")):
            monkeypatch.delenv(name)
    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def device():
    """The one that URM_TEST_DEVICE names, else the CPU."""
    return torch.device(DEVICE)


@pytest.fixture(params=MACHINES, ids=lambda machine: "/".join(filter(None, machine)))
def machine(request, device):
    """(backend, instruction set, way to scan), forced for the test. On "cuda" tables are packed, with codes and
    cells or none that each test has drawn by its name."""
    if request.param[0] == "cuda":
        if reason := packed_calls.why_not(device):
            pytest.skip(reason)
        drawn = zlib.crc32(request.node.name.encode())
        kinds, cell_rows = CODES[drawn % len(CODES)], CELLS[drawn // len(CODES) % len(CELLS)]
        with packed_calls.packed_calls(kinds, device, cell_rows):
            yield request.param
        return
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


@pytest.fixture(params=["portable", "avx2", "avx512_vnni", "cuda"])
def code_isa(request):
    """An instruction set with sums of codes of its own, forced for the test, or the stand-in of the CUDA kernels."""
    if request.param == "cuda":
        if reason := packed_calls.why_not(torch.device("cpu")):
            pytest.skip(reason)
        with packed_calls.stand_in():
            yield request.param
        return
    if ("cpu", request.param) not in available_backends():
        pytest.skip(f"cpu/{request.param} cannot run on this machine")
    with forced("cpu", request.param):
        yield request.param


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    """The backends by name, each with its best instruction set."""
    if request.param not in [name for name, _ in available_backends(device)]:
        pytest.skip(f"{request.param} cannot run on {device} of this machine")
    return request.param
