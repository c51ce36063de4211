"""NeighborGraph: exact neighbours, pads, levels, other libraries' indexes, files, errors in words."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from urm_kernels import ItemTable, NeighborGraph, graph_build
from urm_kernels.testing import make_items

METRICS = ("cosine", "euclidean", "inner")


def by_brute_force(items, degree, metric):
    """int64 [N, degree] in float64, and how much better a neighbour is than the next [N, degree]."""
    x = items.double()
    x = torch.nn.functional.normalize(x) if metric == "cosine" else x
    near = -torch.cdist(x, x).square() / 2 if metric == "euclidean" else x @ x.T
    near.fill_diagonal_(-torch.inf)
    best = near.topk(degree)
    return near, best.values


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["clustered", "decay"])
def test_neighbours_are_the_nearest_rows(metric, kind):
    items = make_items(kind, 5000, 17, 1)  # enough for codes
    graph = NeighborGraph.build(items, 9, metric=metric, levels=1)
    assert (len(graph), graph.degree, graph.neighbors.dtype) == (5000, 9, torch.int32)
    near, best = by_brute_force(items, 9, metric)
    ids = graph.neighbors.long()
    assert (ids != torch.arange(5000)[:, None]).all() and (ids >= 0).all()
    assert all(len(row.unique()) == 9 for row in ids[:100])
    torch.testing.assert_close(near.gather(1, ids), best, rtol=0, atol=2e-5 * float(best.abs().max()))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_levels_share_the_degree_and_repeat_no_row(levels):
    items = make_items("duplicates", 4000, 8, 1)  # eight copies of each row
    graph = NeighborGraph.build(items, 16, levels=levels, thinning=5, seed=3)
    ids = graph.neighbors
    assert (ids >= 0).all() and all(len(row.unique()) == 16 for row in ids[:200])
    shares = graph_build.shares(16, levels)
    assert sum(shares) == 16 and min(shares) >= 1
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(3))
    start = 0
    for level, share in enumerate(shares):
        members = order[: 4000 // 5**level]
        assert torch.isin(ids[:, start : start + share].long(), members).all()
        start += share
    same = (items[ids[:, :7].long()] == items[:, None]).all(2).float().mean()
    assert same == 1.0  # the copies come first


@pytest.mark.parametrize(("rows", "degree"), [(0, 3), (1, 3), (3, 5), (5, 0)])
def test_what_is_missing_is_padded(rows, degree):
    graph = NeighborGraph.build(torch.randn(rows, 4), degree, levels=1)
    assert graph.neighbors.shape == (rows, degree)
    assert (graph.neighbors >= 0).sum() == rows * min(degree, max(rows - 1, 0))


def test_a_table_and_halves_are_taken_and_progress_is_told():
    items, told = make_items("iid", 1100, 8, 1), []
    graph = NeighborGraph.build(ItemTable(items.half()), 4, progress=lambda done, rows: told.append((done, rows)))
    assert told[-1] == (2200, 2200) and len(told) > 2
    again = NeighborGraph.build(items.half(), 4)
    assert torch.equal(graph.neighbors, again.neighbors)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_given_neighbours_are_not_copied(dtype):
    given = torch.tensor([[1, -1], [0, 2], [-1, -1]], dtype=dtype)
    graph = NeighborGraph.from_neighbors(given)
    assert graph.neighbors.data_ptr() == given.data_ptr()
    assert repr(graph) == f"NeighborGraph(rows=3, degree=2, {dtype}, device=cpu)"
    assert torch.equal(NeighborGraph.from_neighbors(given.numpy()).neighbors, given)
    assert NeighborGraph.from_neighbors(given.mT.contiguous().mT).neighbors.is_contiguous()
    assert graph.to("cpu") is graph


@pytest.mark.parametrize(
    ("neighbors", "error", "said"),
    [
        ([[0]], TypeError, "neighbors: a torch.Tensor is wanted, list came"),
        (torch.zeros(3, 2), TypeError, "neighbors: dtype torch.int32 or torch.int64 is wanted, torch.float32 came"),
        (torch.zeros(3, dtype=torch.int32), ValueError, "neighbors: shape [N, degree] is wanted, [3] came"),
        (torch.tensor([[1], [2]]), ValueError, "neighbors: rows from -1 to 1 are wanted, 2 came"),
        (torch.tensor([[1], [-2]]), ValueError, "neighbors: rows from -1 to 1 are wanted, -2 came"),
    ],
)
def test_wrong_neighbours(neighbors, error, said):
    with pytest.raises(error, match=re.escape(said)):
        NeighborGraph.from_neighbors(neighbors)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"items": torch.ones(3, 2).int()}, TypeError, "items: dtype"),
        ({"items": torch.ones(3)}, ValueError, "items: shape [N, r] is wanted, [3] came"),
        ({"degree": 2.0}, TypeError, "degree: an integer is wanted"),
        ({"metric": "l2"}, ValueError, "metric: one of cosine, euclidean, inner is wanted, 'l2' came"),
        ({"levels": 0}, ValueError, "levels: from 1 to the degree, 4, is wanted, 0 came"),
        ({"levels": 5}, ValueError, "levels: from 1 to the degree, 4, is wanted, 5 came"),
        ({"thinning": 1}, ValueError, "thinning: at least 2 is wanted, 1 came"),
        ({"progress": 3}, TypeError, "progress: a function of two integers or None is wanted, 3 came"),
    ],
)
def test_wrong_arguments_of_build(changes, error, said):
    with pytest.raises(error, match=re.escape(said)):
        NeighborGraph.build(**{"items": torch.randn(9, 2), "degree": 4, **changes})


def test_save_and_load(tmp_path):
    graph = NeighborGraph.build(torch.randn(50, 4), 6)
    graph.save(tmp_path / "graph.safetensors")
    assert torch.equal(NeighborGraph.load(tmp_path / "graph.safetensors").neighbors, graph.neighbors)


def test_files_that_hold_no_graph(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        NeighborGraph.load(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(ValueError, match="that can be read"):
        NeighborGraph.load(tmp_path / "short")
    save_file({"other": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds other, `neighbors` alone is wanted"):
        NeighborGraph.load(tmp_path / "other")
    save_file({"neighbors": torch.tensor([[7]])}, tmp_path / "wrong")
    with pytest.raises(ValueError, match="neighbors: rows from -1 to 0 are wanted, 7 came"):
        NeighborGraph.load(tmp_path / "wrong")


def assert_links_are_near(graph, x):
    """Links of an HNSW index lead to rows that are nearer than most."""
    ids = graph.neighbors.long()
    assert (ids >= 0).any(1).all() and (ids != torch.arange(len(x))[:, None]).all()
    distance = torch.cdist(x, x)
    linked = distance.gather(1, ids.clamp(min=0))[ids >= 0].mean()
    assert linked < 0.7 * distance.mean()


def test_links_of_an_index_of_faiss():
    faiss = pytest.importorskip("faiss")
    x = make_items("clustered", 700, 8, 1)
    index = faiss.IndexHNSWFlat(8, 6)
    index.add(x.numpy())
    graph = NeighborGraph.from_faiss(index)
    assert (len(graph), graph.degree) == (700, 12)
    assert_links_are_near(graph, x)
    with pytest.raises(TypeError, match="index: a faiss index with `hnsw` is wanted, IndexFlatL2 came"):
        NeighborGraph.from_faiss(faiss.IndexFlatL2(8))


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_links_of_an_index_of_hnswlib(order):
    hnswlib = pytest.importorskip("hnswlib")
    x = make_items("clustered", 700, 8, 1)
    index = hnswlib.Index("l2", 8)
    index.init_index(900, M=6, ef_construction=50)
    labels = np.arange(700) if order == "ascending" else np.random.default_rng(1).permutation(700)
    index.add_items(x.numpy()[labels], labels, num_threads=1)
    graph = NeighborGraph.from_hnswlib(index)
    assert (len(graph), graph.degree) == (700, 12)
    assert_links_are_near(graph, x)
    other = hnswlib.Index("l2", 8)
    other.init_index(9)
    other.add_items(x.numpy()[:3], np.array([0, 2, 5]))
    with pytest.raises(ValueError, match="index: labels 0 to 2, the rows, are wanted, others came"):
        NeighborGraph.from_hnswlib(other)
    with pytest.raises(TypeError, match=r"index: an hnswlib.Index is wanted, int came"):
        NeighborGraph.from_hnswlib(3)
