"""The first ItemTable: construction, factoring, ids, one file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from urm_kernels import ItemTable, score_topk


def table(rows=50, r=8, device="cpu", **options):
    generator = torch.Generator().manual_seed(1)
    return ItemTable(torch.randn(rows, r, generator=generator).to(device), **options)


def test_a_table_scores_as_its_factors_and_bias(device):
    bias = torch.linspace(-1, 1, 50).to(device)
    held = table(bias=bias, device=device)
    queries = torch.randn(2, 3, 8).to(device)
    got, wanted = score_topk(queries, held, 7), score_topk(queries, held.factors, 7, bias=bias)
    assert torch.equal(got.scores, wanted.scores) and torch.equal(got.ids, wanted.ids)
    with pytest.raises(ValueError, match="bias"):
        score_topk(queries, held, 7, bias=bias)


def test_a_table_moves_to_a_device_and_back(device):
    held = table(bias=torch.linspace(-1, 1, 50), ids=torch.arange(50) * 3)
    queries, wanted = torch.randn(2, 3, 8), {name: tensor.clone() for name, tensor in held.state_dict().items()}
    here = score_topk(queries, held, 7)
    held.to(device)
    assert {tensor.device.type for tensor in held.state_dict().values()} == {device.type}
    there = score_topk(queries.to(device), held, 7)
    assert torch.equal(there.scores.cpu(), here.scores) and torch.equal(there.ids.cpu(), here.ids)
    assert torch.equal(held.to_external(there.ids).cpu(), here.ids * 3)
    held.cpu()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in held.state_dict().items())


def test_trainable_makes_parameters_and_gradients_reach_them(device):
    held = table(bias=torch.zeros(50, device=device), device=device, trainable=True)
    assert {name for name, _ in held.named_parameters()} == {"factors", "bias"}
    score_topk(torch.randn(2, 3, 8).to(device), held, 5).scores.sum().backward()
    assert held.factors.grad.abs().sum() > 0 and held.bias.grad.sum() == 10
    frozen = table(bias=torch.zeros(50))
    assert not list(frozen.parameters()) and set(frozen.state_dict()) == {"factors", "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_from_dense_is_the_truncated_svd(device, dtype):
    generator = torch.Generator().manual_seed(2)
    W = (torch.randn(300, 24, generator=generator) * torch.arange(1, 25) ** -0.5).to(device, dtype)
    held, projection, energy = ItemTable.from_dense(W, 6)
    _, singular, right = torch.linalg.svd(W.double(), full_matrices=False)
    assert held.factors.shape == (300, 6) and projection.shape == (24, 6)
    assert energy == pytest.approx(float(singular[:6].square().sum() / singular.square().sum()), rel=1e-9)
    best = W.double() @ right[:6].T @ right[:6]
    assert torch.allclose(held.factors.double() @ projection.double().T, best, atol=1e-5)
    assert torch.equal(projection, ItemTable.from_dense(W, 6)[1])


@pytest.mark.parametrize(
    ("W", "rank", "words"),
    [
        (torch.zeros(4), 1, "W: shape"),
        (torch.zeros(4, 3), 4, "rank: from 1 to d = 3"),
        (torch.zeros(4, 3), 0, "rank"),
        (torch.full((4, 3), torch.nan), 2, "finite"),
    ],
)
def test_from_dense_refuses_in_words(W, rank, words):
    with pytest.raises(ValueError, match=words):
        ItemTable.from_dense(W, rank)


def test_external_ids_there_and_back(device):
    names = torch.randperm(50, generator=torch.Generator().manual_seed(4)).to(device) * 10 + 7
    held = table(ids=names, device=device)
    rows = torch.tensor([[3, 0, -1], [49, 7, -1]], device=device)
    external = held.to_external(rows)
    assert external.tolist() == [[names[3], names[0], -1], [names[49], names[7], -1]]
    assert torch.equal(held.rows_of(external[:, :2]), rows[:, :2])
    with pytest.raises(ValueError, match="id 8 is not in the table"):
        held.rows_of(torch.tensor([7, 8], device=device))
    with pytest.raises(ValueError, match="507 came twice"):
        table(ids=torch.full((50,), 507, device=device), device=device)


@pytest.mark.real_device  # safetensors asks for the addresses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_save_and_load_keep_every_bit(tmp_path, device, dtype):
    held = ItemTable(table().factors.to(dtype), bias=torch.randn(50), ids=torch.arange(50) + 5).to(device)
    held.save(tmp_path / "t.safetensors")
    read = ItemTable.load(tmp_path / "t.safetensors", device=device)
    for name, tensor in held.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]) and tensor.dtype == read.state_dict()[name].dtype


def described(**changes):
    return json.dumps({"format": 1, "rows": 50, "rank": 8, "tensors": ["factors"], **changes})


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "not of an ItemTable"),
        ("{", "unreadable"),
        ("[1]", "unreadable"),
        (described(format=5), "format 5"),
        (described(rows=49), r"shape \[50, 8\]"),
        (described(tensors=["factors", "bias"]), "its metadata names"),
    ],
)
def test_a_wrong_file_is_refused_in_words(tmp_path, metadata, words):
    path = tmp_path / "t.safetensors"
    save_file({"factors": table().factors}, path, metadata=None if metadata is None else {"urm_kernels": metadata})
    with pytest.raises(ValueError, match=words):
        ItemTable.load(path)


def test_a_damaged_file_is_refused_in_words(tmp_path):
    path = tmp_path / "t.safetensors"
    table().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        ItemTable.load(path)
    with pytest.raises(FileNotFoundError):
        ItemTable.load(tmp_path / "none.safetensors")
