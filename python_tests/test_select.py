"""Which backend runs a call, and the reasons why others do not."""

import re
from types import SimpleNamespace

import pytest
import torch

from urm_kernels import env, score_topk
from urm_kernels.backends import cuda, select, triton
from urm_kernels.backends.codes import Codes
from urm_kernels.backends.table_view import TableView

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """card(capability, version): as if a card of that compute capability and that Triton were there."""

    def pretend(capability, version=(3, 6), hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(triton, "_missing", lambda: None)
        monkeypatch.setattr(triton, "_version", lambda: version)
        triton._unfit.cache_clear()

    yield pretend
    triton._unfit.cache_clear()


@pytest.mark.parametrize(
    ("capability", "version", "dtype", "reason"),
    [
        ((9, 0), (3, 6), torch.bfloat16, None),
        ((8, 0), (3, 6), torch.float32, None),
        ((8, 9), (3, 6), torch.float8_e4m3fn, None),
        (
            (8, 0),
            (3, 6),
            torch.float8_e4m3fn,
            "for float8 items, compute capability 8.9 is needed, this device has 8.0",
        ),
        ((7, 5), (3, 6), torch.float16, "compute capability 8.0 is needed, this device has 7.5"),
        ((10, 0), (3, 6), torch.float16, "for Blackwell, Triton 3.8 is needed, this is 3.6"),
        ((10, 0), (3, 8), torch.float8_e4m3fn, None),
        ((9, 0), (3, 6), torch.float64, "float64 is computed by the reference backend"),
    ],
)
def test_a_card_is_used_or_declined_with_the_reason(card, capability, version, dtype, reason):
    card(capability, version)
    said = triton.why_not(CUDA, (torch.float32, dtype))
    assert said is None if reason is None else said.startswith(reason)


def test_other_makers_cards_are_declined(card):
    card((9, 0), hip="6.0")
    assert "NVIDIA" in triton.why_not(CUDA, (torch.float32,))


def test_without_triton_the_reason_is_that(card, monkeypatch):
    card((9, 0))
    monkeypatch.setattr(triton, "_missing", lambda: "triton is not installed")
    assert triton.why_not(CUDA, (torch.float32,)) == "triton is not installed"


def test_every_backend_has_every_function():
    for name, backend in select.BACKENDS.items():
        functions = ("score_topk",) if name == "cuda" else (*select.FUNCTIONS, "candidate_dots")
        assert all(hasattr(backend, function) for function in functions)


def test_packed_tables_on_a_card_are_the_cuda_backends_and_plain_ones_tritons(card, monkeypatch):
    card((9, 0))
    monkeypatch.setattr(cuda.launching, "why_not", lambda device: None)
    cuda._unfit.cache_clear()
    meta = {"device": "meta"}
    codes = Codes(*(torch.empty(2, **meta) for _ in range(3)))
    items = torch.empty(40, 8, **meta)
    items_there = SimpleNamespace(device=CUDA, dtype=torch.float32)
    view = TableView(items, codes=codes)
    monkeypatch.setattr(TableView, "dtypes", lambda self: (torch.float32,))
    for table, wanted in ((view, cuda), (view._replace(codes=None), triton)):
        table = table._replace(items=items_there)
        assert select.choose("score_topk", torch.empty(1, 1, 8, **meta), table, "") is wanted
    assert select.choose("log_partition", torch.empty(1, 1, 8, **meta), view._replace(items=items_there), "") is triton
    card((7, 5))
    cuda._unfit.cache_clear()
    assert "8.0 is needed, this device has 7.5" in cuda.why_not(CUDA, ())
    cuda._unfit.cache_clear()


def test_the_report_says_what_each_backend_runs_where(card):
    card((8, 0))
    lines = dict(select.describe())
    assert lines["reference"] == "cpu: usable; cuda: usable"
    assert (
        "float64 is computed by the reference backend" in lines["cpu"] and "cuda: tensors are on cuda" in lines["cpu"]
    )
    assert re.search(r"cuda: usable, but for float8 items, compute capability 8.9", lines["triton"])


def test_the_whole_report_names_them(capsys):
    text = env.report()
    assert all(re.search(rf"^  {name} +\S", text, re.M) for name in select.BACKENDS)


def test_a_preferred_backend_that_declines_says_why_once(caplog):
    select._said.clear()
    items = TableView(torch.ones(3, 4))
    with caplog.at_level("INFO", logger="urm_kernels"):
        for _ in range(2):
            assert select.choose("score_topk", torch.ones(1, 1, 4).double(), items, "").__name__.endswith("reference")
    said = [record.message for record in caplog.records if "backend cpu" in record.message]
    assert len(said) == 1 and said[0].endswith("float64 is computed by the reference backend")


def test_one_asked_for_that_cannot_raises_with_its_reason(monkeypatch):
    monkeypatch.setenv("URM_BACKEND", "triton")
    if triton.interpreted():
        pytest.skip("it can, in the interpreter")
    with pytest.raises(ValueError, match=r"^backend: 'triton' cannot run this call: tensors are on cpu"):
        score_topk(torch.ones(4), torch.ones(3, 4), 1)
