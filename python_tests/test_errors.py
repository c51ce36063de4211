"""A wrong argument is refused in words that name it; nothing is left broken behind."""

import logging

import numpy as np
import pytest
import torch
from support import ids_of, run_python

from urm_kernels import score_topk
from urm_kernels.backends import cpu, select
from urm_kernels.testing import available_backends

QUERIES, ITEMS = torch.ones(2, 3, 4), torch.arange(20.0).view(5, 4)
ONES = {"bias": torch.zeros(5), "mask": torch.ones(5, dtype=torch.bool), "query_mask": torch.ones(2, 3).bool()}

WRONG_TYPES = [
    ("queries", {"queries": QUERIES.long()}),
    ("queries", {"queries": QUERIES.bool()}),
    ("queries", {"queries": QUERIES.to(torch.complex64)}),
    ("queries", {"queries": QUERIES.tolist()}),
    ("queries", {"queries": QUERIES.tolist()}),
    ("queries", {"queries": QUERIES.to_sparse()}),
    ("queries", {"queries": None}),
    ("items", {"items": ITEMS.int()}),
    ("items", {"items": ITEMS.to(torch.uint8)}),
    ("items", {"items": ITEMS.bool()}),
    ("items", {"items": ITEMS.to(torch.complex128)}),
    ("items", {"items": ITEMS.to(torch.float8_e4m3fn)}),
    ("items", {"items": ITEMS.to_sparse()}),
    ("items", {"items": None}),
    ("k", {"k": 2.0}),
    ("k", {"k": "2"}),
    ("k", {"k": None}),
    ("k", {"k": True}),
    ("k", {"k": False}),
    ("k", {"k": np.bool_(True)}),
    ("k", {"k": torch.tensor(True)}),
    ("k", {"k": torch.tensor(2.0)}),
    ("projection", {"projection": torch.ones(4, 4).long()}),
    ("projection", {"projection": [[1.0] * 4] * 4}),
    ("bias", {"bias": torch.zeros(5).long()}),
    ("bias", {"bias": torch.zeros(5).bool()}),
    ("bias", {"bias": torch.zeros(5).to(torch.complex64)}),
    ("bias", {"bias": 1.0}),
    ("mask", {"mask": torch.ones(5)}),
    ("mask", {"mask": torch.ones(5).long()}),
    ("mask", {"mask": torch.ones(5).to(torch.int8)}),
    ("mask", {"mask": [True] * 5}),
    ("query_mask", {"query_mask": torch.ones(2, 3)}),
    ("query_mask", {"query_mask": torch.ones(2, 3, dtype=torch.uint8)}),
    ("query_mask", {"query_mask": True}),
    ("exclude", {"exclude": torch.zeros(2, 1)}),
    ("exclude", {"exclude": torch.zeros(2, 1, dtype=torch.int32)}),
    ("exclude", {"exclude": torch.zeros(2, 1).bool()}),
    ("exclude", {"exclude": [[0], [1]]}),
]

WRONG_VALUES = [
    ("queries", {"queries": torch.ones(())}),
    ("queries", {"queries": torch.ones(1, 2, 3, 4)}),
    ("items", {"items": torch.ones(4)}),
    ("items", {"items": torch.ones(5, 3)}),
    ("items", {"items": torch.ones(4, 5)}),
    ("items", {"items": torch.ones(1, 5, 4)}),
    ("items", {"items": torch.ones(1, 4).expand(2**32, 4)}),
    ("items", {"items": ITEMS.to("meta")}),
    ("k", {"k": -1}),
    ("k", {"k": 2**63}),
    ("k", {"k": 10**30}),
    ("projection", {"projection": torch.ones(4)}),
    ("projection", {"projection": torch.ones(5, 4)}),
    ("projection", {"projection": torch.ones(4, 4, device="meta")}),
    ("items", {"projection": torch.ones(4, 7)}),
    ("reduce", {"reduce": "min"}),
    ("reduce", {"reduce": ""}),
    ("reduce", {"reduce": None}),
    ("reduce", {"reduce": 3}),
    ("bias", {"bias": torch.zeros(4)}),
    ("bias", {"bias": torch.zeros(1)}),
    ("bias", {"bias": torch.zeros(())}),
    ("bias", {"bias": torch.zeros(1, 5)}),
    ("bias", {"bias": torch.zeros(5, device="meta")}),
    ("mask", {"mask": torch.ones(4).bool()}),
    ("mask", {"mask": torch.ones(6).bool()}),
    ("mask", {"mask": torch.ones(()).bool()}),
    ("mask", {"mask": torch.ones(1, 5).bool()}),
    ("mask", {"mask": torch.ones(3, 5).bool()}),
    ("mask", {"mask": torch.ones(5, 2).bool()}),
    ("mask", {"mask": torch.ones(2, 1, 5).bool()}),
    ("mask", {"mask": torch.ones(5, dtype=torch.uint8)}),
    ("mask", {"mask": torch.ones(2, 2, dtype=torch.uint8)}),
    ("mask", {"mask": torch.ones(5, device="meta").bool()}),
    ("query_mask", {"query_mask": torch.ones(3).bool()}),
    ("query_mask", {"query_mask": torch.ones(2, 2).bool()}),
    ("query_mask", {"query_mask": torch.ones(3, 2).bool()}),
    ("query_mask", {"query_mask": torch.ones(1, 3).bool()}),
    ("query_mask", {"query_mask": torch.ones(2, 3, device="meta").bool()}),
    ("exclude", {"exclude": torch.zeros(2).long()}),
    ("exclude", {"exclude": torch.zeros(1, 2).long()}),
    ("exclude", {"exclude": torch.zeros(3, 2).long()}),
    ("exclude", {"exclude": torch.zeros(2, 1, 1).long()}),
    ("exclude", {"exclude": torch.zeros(2, 1, device="meta").long()}),
    ("backend", {"backend": "gpu"}),
    ("backend", {"backend": "CPU"}),
    ("backend", {"backend": "cpu", "items": ITEMS.double()}),
]


def on(device, value):
    """Tensors of the CPU moved; one row where all are the same, of which a copy would hold every one."""
    if not torch.is_tensor(value) or value.device.type != "cpu":
        return value
    if value.layout == torch.strided and value.dim() and value.stride(0) == 0:
        return value[:1].to(device).expand(value.shape)
    return value.to(device)


def call(device, **changes):
    given = {"queries": QUERIES, "items": ITEMS, "k": 2, **changes}
    given = {name: on(device, value) for name, value in given.items()}
    return score_topk(given.pop("queries"), given.pop("items"), given.pop("k"), **given)


@pytest.mark.parametrize(("name", "changes"), WRONG_TYPES, ids=lambda part: part if isinstance(part, str) else "")
def test_wrong_types(device, name, changes):
    with pytest.raises(TypeError, match=f"^{name}: .*wanted.* came"):
        call(device, **changes)


@pytest.mark.parametrize(("name", "changes"), WRONG_VALUES, ids=lambda part: part if isinstance(part, str) else "")
def test_wrong_values(device, name, changes):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(device, **changes)


@pytest.mark.parametrize(
    ("name", "value"), [("sorted", "yes"), ("sorted", None), ("sparse_grad", 3), ("backend", 3), ("backend", b"cpu")]
)
def test_flags_and_backend_of_the_wrong_type(device, name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        call(device, **{name: value})


def test_numbers_that_are_integers_are_taken(device):
    for k in (np.int64(2), np.uint8(2), torch.tensor(2)):
        assert ids_of(call(device, k=k)) == [[4, 3]] * 2


def test_a_bias_beside_a_table_that_has_one(device):
    from urm_kernels import ItemTable

    table = ItemTable(ITEMS.to(device), bias=torch.zeros(5, device=device))
    with pytest.raises(ValueError, match=r"^bias: "):
        call(device, items=table, bias=torch.zeros(5))


@pytest.mark.parametrize(("rows", "bad"), [(5, 5), (5, 2**62), (5, -2), (0, 0)])
def test_rows_that_do_not_exist_are_refused_where_looking_is_free_and_else_exclude_nothing(backend, device, rows, bad):
    given = {"items": ITEMS[:rows], "backend": backend}
    exclude = torch.tensor([[-1], [bad]])
    if device.type == "cpu":
        with pytest.raises(ValueError, match=f"^exclude: .*{bad} came"):
            call(device, exclude=exclude, **given)
    else:
        # To look at them would be to wait for the device.
        assert ids_of(call(device, exclude=exclude, **given)) == ids_of(call(device, **given))


@pytest.mark.parametrize("text", ["sse", "AVX2", "avx2 ", "portable,avx2"])
def test_an_unknown_instruction_set(monkeypatch, text):
    monkeypatch.setenv("URM_CPU_ISA", text)
    with pytest.raises(ValueError, match=r"^URM_CPU_ISA: .*portable"):
        score_topk(QUERIES, ITEMS, 2, backend="cpu")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", " ", "\N{SUPERSCRIPT TWO}", "99999999999", "1" * 5000])
def test_bad_thread_counts(monkeypatch, text):
    monkeypatch.setenv("URM_NUM_THREADS", text)
    with pytest.raises(ValueError, match=r"^URM_NUM_THREADS: "):
        score_topk(QUERIES, ITEMS, 2, backend="cpu")


def test_an_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("URM_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"^backend: .*'tpu' came"):
        score_topk(QUERIES, ITEMS, 2)


def test_the_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("URM_BACKEND", "tpu")
    assert ids_of(score_topk(QUERIES, ITEMS, 1, backend="reference")) == [[4], [4]]


@pytest.mark.parametrize("k", [2**40, 2**62])
def test_a_result_that_does_not_fit_is_a_memory_error(machine, device, k):
    with pytest.raises((MemoryError, torch.OutOfMemoryError)):
        call(device, k=k)
    assert ids_of(call(device)) == [[4, 3]] * 2


LIMITED = """
    import os, resource, threading
    import torch
    from urm_kernels import score_topk
    queries, items = torch.ones(1, 1, 4), torch.arange(80.0).view(20, 4)
    before = score_topk(queries, items, 5, backend="{backend}")
    {prepare}
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ({spare} << 20),) * 2)
    {attempt}
    after = score_topk(queries, items, 5, backend="{backend}")
    assert torch.equal(before.ids, after.ids) and torch.equal(before.scores, after.scores)
    print("usable")
"""


def limited(backend, prepare, spare, attempt, **environment):
    code = "\n".join(line.removeprefix("    ") for line in LIMITED.splitlines())
    code = code.format(backend=backend, prepare=prepare, spare=spare, attempt=attempt)
    assert run_python(code, **environment) == "usable\n"


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_no_memory_for_the_result_leaves_the_library_usable(name):
    attempt = f"""
try:
    score_topk(queries, items, 1 << 27, backend="{name}")
except MemoryError as error:
    assert "memory" in str(error)
else:
    raise AssertionError("no MemoryError")
"""
    limited(name, "", 200, attempt)


def test_no_memory_for_the_running_buffers_leaves_the_library_usable():
    # The result takes 60 MB, the buffers of the running best 45 MB.
    attempt = """
for _ in range(3):
    try:
        score_topk(queries, wide, 5_000_000, backend="cpu")
    except MemoryError:
        pass
    else:
        raise AssertionError("no MemoryError")
"""
    limited("cpu", "wide = torch.ones(1, 4).expand(20_000_000, 4)", 85, attempt, URM_NUM_THREADS="1")


def test_a_system_that_gives_no_more_threads_is_no_error():
    attempt = """
many = score_topk(wide_queries, wide, 50, backend="cpu")
assert torch.equal(many.ids, alone.ids) and torch.equal(many.scores, alone.scores)
"""
    prepare = """
wide, wide_queries = torch.randn(60000, 32), torch.randn(4, 8, 32)
os.environ["URM_NUM_THREADS"] = "1"
alone = score_topk(wide_queries, wide, 50, backend="cpu")
os.environ["URM_NUM_THREADS"] = "64"
"""
    limited("cpu", prepare, 24, attempt)


@pytest.fixture
def unbuilt(monkeypatch):
    """The extension as it is where it was never compiled."""

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(cpu, "_extension", None)
    monkeypatch.setattr(cpu, "_missing", None)
    monkeypatch.setattr(cpu.importlib, "import_module", missing)
    monkeypatch.setattr(select, "_said", set())


def test_without_the_extension_the_reference_runs_and_says_so_once(unbuilt, caplog):
    with caplog.at_level(logging.INFO, logger="urm_kernels"):
        for _ in range(3):
            assert ids_of(score_topk(QUERIES, ITEMS, 2)) == [[4, 3]] * 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) and next(line for line in said if "not built" in line).startswith("backend cpu")
    assert available_backends("cpu") == [("reference", None)]


def test_without_the_extension_backend_cpu_is_refused_in_words(unbuilt, monkeypatch):
    with pytest.raises(ValueError, match=r"^backend: 'cpu' cannot run.*not built"):
        score_topk(QUERIES, ITEMS, 2, backend="cpu")
    monkeypatch.setenv("URM_BACKEND", "cpu")
    with pytest.raises(ValueError, match=r"^backend: 'cpu' cannot run.*not built"):
        score_topk(QUERIES, ITEMS, 2)


def test_nothing_is_printed(capfd):
    score_topk(QUERIES, ITEMS, 2, **ONES)
    score_topk(QUERIES.double(), ITEMS, 2)
    out, err = capfd.readouterr()
    assert out == "" and err == ""
