"""bench/explore.py on tables of a moment: what is measured is right, and written down."""

import json
import sys
from pathlib import Path

import pytest
import torch

from urm_kernels import NeighborGraph
from urm_kernels.backends import cpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import explore


@pytest.fixture(autouse=True)
def _needs_the_extension():
    if reason := cpu.why_not(torch.device("cpu"), ()):
        pytest.skip(reason)


def test_agreement_is_the_share_of_the_wanted():
    found, wanted = torch.tensor([[1, 2, -1], [4, 5, 6]]), torch.tensor([[2, 3, 1], [6, 4, 5]])
    assert explore.agreement(found, wanted).tolist() == [pytest.approx(2 / 3), 1.0]


def test_a_run_writes_rounds_and_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(explore, "_TURNS", 1)
    monkeypatch.delenv("URM_EMBEDDINGS_SMOLLM2", raising=False)
    NeighborGraph(torch.randint(900, (900, 4))).save(tmp_path / "random")
    small = ["--rows", "900", "--k", "10", "--users", "2", "--results", str(tmp_path / "found.json")]
    graphs = ["--graph", "cosine", "euclidean/1", str(tmp_path / "random")]
    assert explore.main(["--data", "clustered", "smollm2", *graphs, *small]) == 0
    cells = json.loads((tmp_path / "found.json").read_text())["cells"]
    assert [cell["graph"]["kind"] for cell in cells] == ["cosine", "euclidean/1", "random"]
    for cell in cells:
        assert [walk["rounds"] for walk in cell["walks"]] == list(explore.ROUNDS)
        for walk in cell["walks"]:
            assert len(walk["rows_of_rounds"]) == walk["rounds"] and 0 <= walk["agreement"] <= 1 and walk["ms"] > 0
    said = capsys.readouterr()
    assert "smollm2 is not measured" in said.err and "agreement" in said.out


@pytest.mark.parametrize("name", ["hnsw", "ivf", "ivf/1"])
def test_graphs_by_faiss_lead_to_near_rows(name):
    pytest.importorskip("faiss")
    items = torch.nn.functional.normalize(torch.randn(3000, 8))
    _, graph = explore.graph_of(name, items)
    ids = graph.neighbors.long()
    assert graph.neighbors.shape == (3000, 32) and (ids != torch.arange(3000)[:, None]).all()
    near = (items[ids.clamp(min=0)] * items[:, None]).sum(2)[ids >= 0]
    assert near.mean() > 0.5
