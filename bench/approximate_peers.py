"""Approximate nearest neighbour libraries as ways to the top k of users with several queries.

Each searches all B M queries in one call of its own batch interface, for k rows a query, and what it finds is merged a
user: the best score of a row counts. More than k rows a query would add nothing: a row of a user's top k is among the k
best of the query that wins there, and every peer here scores its last candidates exactly. Packages are imported when a
peer is built; one that is missing is a skip with its reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import explore
import numpy
import torch
from torch import Tensor

from urm_kernels import NeighborGraph, TopK, explore_topk
from urm_kernels.bench.peers import SkipError, merged

Setting = dict[str, int]
Search = Callable[[Tensor, int], TopK]


class ApproximatePeer(NamedTuple):
    """An index and its knobs.

    build: an index of float32 rows. save, load: into and from a folder, whose size is what the index takes. at: the
    search of an index with its knobs set; the search made last is the one that may be called. settings: what is tried,
    low values first. reads_rows: whether it needs the rows beside its index.
    """

    name: str
    build: Callable[[Tensor], Any]
    save: Callable[[Any, Path], None]
    load: Callable[[Path, Tensor], Any]
    at: Callable[[Any, Setting], Search]
    settings: tuple[Setting, ...]
    reads_rows: bool = False


def each(**values: Iterable[int]) -> tuple[Setting, ...]:
    """All combinations."""
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values()))


def _by_query(find: Callable[[numpy.ndarray, int], tuple[numpy.ndarray, numpy.ndarray]]) -> Search:
    """find: (scores, ids) of the k best rows of each query."""

    def search(queries: Tensor, k: int) -> TopK:
        scores, ids = find(queries.flatten(0, 1).numpy(), k)
        return TopK(*merged(scores, ids, len(queries), k))

    return search


# faiss

_MANY_ROWS = 4_000_000


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise SkipError(f"faiss is not installed ({error})") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _faiss_index(recipe: str, rows: Tensor) -> Any:
    """recipe: as faiss.index_factory takes it, but for the number of lists and r."""
    faiss = _faiss()
    lists = 2048 if len(rows) < _MANY_ROWS else 4096  # with 8,192 training alone takes ten minutes
    recipe = recipe.format(lists=min(lists, len(rows) // 16), r=rows.shape[1])
    index = faiss.index_factory(rows.shape[1], recipe, faiss.METRIC_INNER_PRODUCT)
    if inverted := faiss.try_extract_index_ivf(index):
        # A row goes to the list of the nearest centroid, and a query looks where its product with the centroid is
        # largest. By products alone, faiss's own way, rows and queries see directions only, and long rows are missed.
        by_product, inverted.quantizer = inverted.quantizer, faiss.IndexFlatL2(rows.shape[1])
        inverted.cp.spherical = False
    index.train(rows.numpy())
    index.add(rows.numpy())
    if inverted:
        by_product.add(inverted.quantizer.reconstruct_n())
        inverted.quantizer = by_product
    return index


def _faiss_save(index: Any, folder: Path) -> None:
    _faiss().write_index(index, str(folder / "index"))


def _faiss_load(folder: Path, rows: Tensor) -> Any:
    return _faiss().read_index(str(folder / "index"))


def _faiss_at(index: Any, setting: Setting) -> Search:
    faiss = _faiss()
    knobs = ",".join(f"{knob}={value}" for knob, value in setting.items())
    inverted = faiss.try_extract_index_ivf(index)

    def find(queries: numpy.ndarray, k: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        if inverted is not None:  # one query is shared out among threads by its lists, several by queries
            inverted.parallel_mode = 1 if len(queries) == 1 else 0
        return index.search(queries, k)

    faiss.ParameterSpace().set_index_parameters(index, knobs)
    return _by_query(find)


def _of_faiss(name: str, recipe: str, settings: tuple[Setting, ...]) -> ApproximatePeer:
    return ApproximatePeer(
        f"faiss {name}", lambda rows: _faiss_index(recipe, rows), _faiss_save, _faiss_load, _faiss_at, settings
    )


# hnswlib

_EF_CONSTRUCTION = 100


def _hnswlib() -> Any:
    try:
        import hnswlib
    except ImportError as error:
        raise SkipError(f"hnswlib is not installed ({error})") from error
    return hnswlib


def _hnswlib_index(rows: Tensor) -> Any:
    index = _hnswlib().Index("ip", rows.shape[1])
    index.init_index(len(rows), M=16, ef_construction=_EF_CONSTRUCTION)
    index.add_items(rows.numpy(), num_threads=torch.get_num_threads())
    return index


def _hnswlib_save(index: Any, folder: Path) -> None:
    index.save_index(str(folder / "index"))


def _hnswlib_load(folder: Path, rows: Tensor) -> Any:
    index = _hnswlib().Index("ip", rows.shape[1])
    index.load_index(str(folder / "index"))
    return index


def _hnswlib_at(index: Any, setting: Setting) -> Search:
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)

    def part(queries: numpy.ndarray, k: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        return index.knn_query(queries, k, num_threads=1)

    def find(queries: numpy.ndarray, k: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        if 1 < len(queries) <= 4 * threads:  # hnswlib takes one thread for so few
            parts = list(pool.map(lambda some: part(some, k), numpy.array_split(queries, threads)))
            ids, distances = (numpy.concatenate(both) for both in zip(*parts, strict=True))
        else:
            ids, distances = index.knn_query(queries, k, num_threads=threads)
        return 1 - distances, ids.astype(numpy.int64)

    index.set_ef(setting["ef"])
    return _by_query(find)


# ScaNN


def _scann() -> Any:
    try:
        from scann import scann_ops_pybind
    except ImportError as error:
        raise SkipError(f"scann is not installed ({error})") from error
    return scann_ops_pybind


def _scann_index(rows: Tensor, **spilling: float) -> Any:
    leaves = min(math.isqrt(len(rows)), len(rows) // 16)
    return (
        _scann()
        .builder(rows.numpy(), 100, "dot_product")
        .set_n_training_threads(torch.get_num_threads())
        .tree(num_leaves=leaves, num_leaves_to_search=50, training_sample_size=250_000, **spilling)
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(1000)
        .build()
    )


def _scann_save(index: Any, folder: Path) -> None:
    index.serialize(str(folder), relative_path=True)


def _scann_load(folder: Path, rows: Tensor) -> Any:
    return _scann().load_searcher(str(folder))


def _scann_at(index: Any, setting: Setting) -> Search:
    def find(queries: numpy.ndarray, k: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        ids, scores = index.search_batched_parallel(queries, k, setting["reorder"], setting["leaves"])
        # Where it found fewer than k, the rest is row 0 with a score of NaN.
        return scores, numpy.where(numpy.isnan(scores), -1, ids.astype(numpy.int64))

    index.set_num_threads(torch.get_num_threads())
    return _by_query(find)


def _of_scann(name: str, **spilling: float) -> ApproximatePeer:
    settings = each(reorder=(300, 1000, 3000), leaves=(8, 16, 32, 64, 128, 256, 512))
    return ApproximatePeer(
        name, lambda rows: _scann_index(rows, **spilling), _scann_save, _scann_load, _scann_at, settings
    )


# URM's own sampler


def _walk_index(rows: Tensor) -> tuple[NeighborGraph, Tensor]:
    _faiss()
    return explore.graph_of("hnsw", rows)[1], rows


def _walk_save(index: tuple[NeighborGraph, Tensor], folder: Path) -> None:
    index[0].save(folder / "graph")


def _walk_load(folder: Path, rows: Tensor) -> tuple[NeighborGraph, Tensor]:
    return NeighborGraph.load(folder / "graph"), rows


def _walk_at(index: tuple[NeighborGraph, Tensor], setting: Setting) -> Search:
    graph, rows = index
    return lambda queries, k: explore_topk(queries, rows, graph, k, seed=1, **setting)


_LISTS = (8, 16, 32, 64, 128, 256, 512, 1024)
_EF = (128, 256, 512, 1024, 2048)
PEERS = (
    _of_faiss("IVFFlat", "IVF{lists},Flat", each(nprobe=_LISTS)),
    _of_faiss("IVFPQFastScan + refine", "IVF{lists},PQ{r}x4fs,RFlat", each(k_factor_rf=(2, 5, 10), nprobe=_LISTS)),
    _of_faiss("PQFastScan + refine", "PQ{r}x4fs,RFlat", each(k_factor_rf=(2, 4, 8, 16, 32, 64))),
    _of_faiss("HNSW", "HNSW16", each(efSearch=_EF)),
    ApproximatePeer("hnswlib", _hnswlib_index, _hnswlib_save, _hnswlib_load, _hnswlib_at, each(ef=_EF)),
    _of_scann("ScaNN"),
    _of_scann("ScaNN, two leaves a row", soar_lambda=1.5, overretrieve_factor=2.0),
    ApproximatePeer("explore_topk", _walk_index, _walk_save, _walk_load, _walk_at, each(rounds=(3, 4, 6, 8, 12)), True),
)
