"""bench/peers.py on tables of a moment: merging, recall and selection are right, and installed peers find rows."""

import json
import sys
from pathlib import Path

import numpy
import pytest
import torch

from urm_kernels import TopK, score_topk, testing
from urm_kernels.backends import cpu
from urm_kernels.bench.peers import SkipError, merged

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import approximate_peers
import peers
import render


def test_a_row_that_several_queries_found_counts_once():
    scores = numpy.array([[5.0, 3.0], [4.0, 1.0], [9.0, 8.0], [7.0, -numpy.inf]], numpy.float32)
    ids = numpy.array([[2, 7], [7, 2], [1, 3], [1, -1]])
    found, rows = merged(scores, ids, 2, 3)
    assert rows.tolist() == [[2, 7, -1], [1, 3, -1]]
    assert found.tolist() == [[5, 4, -torch.inf], [9, 8, -torch.inf]]


class Prefix:
    """Searches the first rows alone, exactly."""

    def __init__(self, items):
        self.items = items

    def at(self, setting):
        return lambda queries, k: score_topk(queries, self.items[: setting["first"]], k)


def a_peer(firsts):
    return approximate_peers.ApproximatePeer(
        "prefix", Prefix, lambda index, folder: None, None, Prefix.at, approximate_peers.each(first=firsts)
    )


def test_recall_is_the_share_of_the_exact_best_that_was_found():
    # Scores ascend with the row: the best four of ten are 9, 8, 7, 6, and the first eight rows hold two of them.
    items = torch.arange(1.0, 11.0)[:, None] * torch.ones(1, 4)
    queries = torch.ones(3, 2, 4)
    wanted = score_topk(queries, items, 4).ids
    ways = peers.swept(a_peer((6, 8, 9, 10, 10)), Prefix(items), queries, 4, wanted)
    # The last setting costs no less than one that found everything.
    assert [(way.setting["first"], way.recall) for way in ways] == [(6, 0.0), (8, 0.5), (9, 0.75), (10, 1.0)]


def test_the_fastest_that_reaches_the_recall():
    ways = [
        {"name": name, "recall": recall, "ms": ms}
        for name, recall, ms in (("a", 0.99, 3.0), ("a", 1.0, 2.0), ("a", 0.98, 1.0), ("b", 1.0, 0.5))
    ]
    assert peers.fastest(ways, "a", 0.99)["ms"] == 2.0
    assert peers.fastest(ways, "a", 0.95)["ms"] == 1.0
    assert peers.fastest(ways, "c", 0.5) is None


@pytest.mark.parametrize("peer", approximate_peers.PEERS, ids=lambda peer: peer.name)
def test_an_installed_peer_finds_rows_and_comes_back_from_its_folder(peer, tmp_path):
    items = testing.make_items("iid", 4000, 16, seed=0)
    queries = testing.make_queries("iid", 5, 3, 16, 1, items)
    try:
        index = peer.build(items)
    except SkipError as reason:
        pytest.skip(str(reason))
    wanted = score_topk(queries, items, 10)
    peer.save(index, tmp_path)
    for each in (index, peer.load(tmp_path, items)):
        for asked, rows in ((queries, wanted), (queries[:1, :1], score_topk(queries[:1, :1], items, 10))):
            found = peer.at(each, peer.settings[-1])(asked, 10)
            right = torch.isin(found.ids, rows.ids)
            assert right.double().mean() > 0.3
            assert torch.equal(found.ids.sort().values.unique_consecutive(dim=1), found.ids.sort().values)
            exact = (asked @ items.T).amax(1).gather(1, found.ids.clamp(min=0))
            assert torch.allclose(found.scores[right], exact[right], rtol=1e-3, atol=1e-3)


@pytest.fixture
def _needs_the_extension():
    if reason := cpu.why_not(torch.device("cpu"), ()):
        pytest.skip(reason)


@pytest.fixture
def quick(monkeypatch):
    def absent(rows):
        raise SkipError("sham is not installed")

    def prefix(rows):
        return Prefix(rows)

    prefix_peer = a_peer((300, 900))._replace(build=prefix, load=lambda folder, rows: Prefix(rows))
    monkeypatch.setattr(peers, "PEERS", (prefix_peer, prefix_peer._replace(name="sham", build=absent)))
    monkeypatch.setattr(peers, "_TURNS", 1)


@pytest.mark.usefixtures("_needs_the_extension", "quick")
def test_a_run_writes_a_table_and_keeps_the_others(tmp_path, monkeypatch):
    arguments = ["--rows", "900", "--k", "10", "--indexes", str(tmp_path), "--results", str(tmp_path / "found.json")]
    for data in ("iid", "clustered", "iid"):
        assert peers.main(["--data", data, *arguments]) == 0
    tables = json.loads((tmp_path / "found.json").read_text())["tables"]
    assert [table["data"] for table in tables] == ["clustered", "iid"]
    for table in tables:
        assert table["left_out"] == {"sham": "sham is not installed"}
        assert [(cell["B"], cell["M"]) for cell in table["cells"]] == list(peers.SHAPES)
        for cell in table["cells"]:
            recall = {way["name"]: way["recall"] for way in cell["ways"]}
            assert recall["packed"] == recall["packed in blocks"] == recall["prefix"] == 1
    (tmp_path / "found.json").rename(tmp_path / "peers_cpu.json")
    text, figures = render.page(tmp_path)
    assert "sham is left out: sham is not installed." in text and "| packed in blocks |" in text
    assert set(figures) == {"bench_peers_cpu.png"}


@pytest.mark.usefixtures("_needs_the_extension", "quick")
def test_a_result_of_ours_that_differs_is_not_timed(tmp_path, monkeypatch):
    def wrong(self, queries, k):
        found = score_topk(queries, self.table, k)
        return TopK(found.scores, found.ids.flip(1))

    monkeypatch.setattr(peers.Ours, "search", wrong)
    with pytest.raises(SystemExit, match="differs from the plain scan: nothing is timed"):
        peers.main(["--data", "iid", "--rows", "900", "--k", "10", "--indexes", str(tmp_path)])
