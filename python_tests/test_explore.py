"""explore_topk: the reference's bits on every machine, what rounds are worth, filters, noise and errors in words."""

import functools
import re

import pytest
import torch
from support import INF, NAN, REDUCTIONS, assert_same_bits, packed

from urm_kernels import ItemTable, NeighborGraph, TopK, explore_topk, score_candidates, score_topk
from urm_kernels.backends import noise
from urm_kernels.table import Serving
from urm_kernels.testing import forced, make_items, make_queries

WALK = {"first": 60, "width": [8, 12], "rounds": 3, "seed": 7}
N, R = 1500, 19


@pytest.fixture
def machine(machine):
    """Every machine but the kernels of packed tables, which have no explore_topk."""
    if machine[0] == "cuda":
        pytest.skip("the cuda backend has no explore_topk")
    return machine


@functools.cache
def made(kind="clustered", users=3, count=4):
    """(queries, items, graph) on the CPU."""
    items = make_items(kind, N, R, 1)
    with forced("reference"):
        near = torch.cdist(items, items).fill_diagonal_(INF).topk(6, largest=False).indices
    return make_queries(kind, users, count, R, 1, items), items, NeighborGraph.from_neighbors(near.int())


def case(index):
    """Options of a call; every one of them occurs with every other somewhere."""
    random = torch.Generator().manual_seed(index)
    options = {"reduce": REDUCTIONS[index % 4]}
    if index & 1:
        options["bias"] = torch.randn(N, generator=random)
        options["temperature"] = 0.4
    if index & 2:
        options["mask"] = torch.rand(3, N, generator=random) < 0.7
        options["streams"] = torch.tensor([5, 0, 2**62])
    if index & 4:
        options["exclude"] = torch.randint(-1, N, (3, 200), generator=random)
    if index & 8:
        options["query_mask"] = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool()
    if index == 6:
        options["mask"] = packed(options["mask"][0])
    return options


def on(device, options):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def walked(device, queries, items, graph, k=20, **options):
    given = on(device, {**WALK, **options})
    return explore_topk(queries.to(device), items.to(device), graph.to(device), k, return_stats=True, **given)


def by_reference(*arguments, **options):
    with forced("reference"):
        return walked(torch.device("cpu"), *arguments, **options)


def assert_same(found, wanted):
    assert_same_bits(TopK(*(t.cpu() for t in found[0])), wanted[0])
    assert torch.equal(found[1].scored.cpu(), wanted[1].scored)


@pytest.mark.parametrize("index", range(16))
def test_every_machine_has_the_bits_of_the_reference(machine, device, index):
    options = case(index)
    assert_same(walked(device, *made(), **options), by_reference(*made(), **options))


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (3.0, 1.0), (0.01, 1.0), (1.0, 1e4), (1.0, 1e-4)])
def test_rows_that_cannot_be_drawn_are_passed_by_without_a_trace(temperature, scale):
    """Many rows a draw, where the CPU makes noise for few of them."""
    items = make_items("clustered", 20_000, 16, 1)
    queries = make_queries("clustered", 1, 4, 16, 1, items) * scale
    graph = NeighborGraph.from_neighbors(torch.randint(20_000, (20_000, 5), dtype=torch.int32))
    walk = {"first": 15_000, "width": [50, 400], "temperature": temperature, "k": 200}
    found = walked(torch.device("cpu"), queries, items, graph, **walk)
    assert_same(found, by_reference(queries, items, graph, **walk))


@pytest.mark.parametrize("kind", ["integer", "duplicates", "equal", "giant"])
def test_ties_and_extremes(machine, device, kind):
    queries, items, graph = made(kind)
    wide = NeighborGraph.from_neighbors(graph.neighbors.long())
    assert_same(walked(device, queries, items, wide), by_reference(queries, items, graph))


def test_numbers_that_are_none_are_passed_by(machine, device):
    queries, items, graph = made()
    items = items.clone()
    items[::7] = NAN
    items[3::11] = INF
    bias = torch.zeros(N)
    bias[::13] = -INF
    found = walked(device, queries, items, graph, bias=bias, k=N)
    assert not found[0].scores.isnan().any()
    assert_same(found, by_reference(queries, items, graph, bias=bias, k=N))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_users_are_the_same_alone_and_together_on_any_number_of_threads(machine, device, monkeypatch, threads):
    if machine[0] != "cpu" and threads > 1:
        pytest.skip("threads are the CPU's")
    monkeypatch.setenv("URM_NUM_THREADS", str(threads))
    queries, items, graph = made(users=13)
    together, stats = walked(device, queries, items, graph)
    for user in (0, 5, 12):
        alone, own = walked(device, queries[user : user + 1], items, graph, streams=torch.tensor([user]))
        assert_same_bits(alone, TopK(*(t[user : user + 1] for t in together)))
        assert torch.equal(own.scored[:, 0], stats.scored[:, user])


def test_more_rounds_agree_more_with_the_full_scan():
    items = make_items("clustered", 20_000, 16, 1)
    queries = make_queries("clustered", 8, 4, 16, 1, items)
    graph = NeighborGraph.build(items, 16)
    best = score_topk(queries, items, 50).ids
    shares = []
    for rounds in (1, 2, 3, 4, 6):
        found, stats = explore_topk(queries, items, graph, 50, rounds=rounds, seed=1, return_stats=True)
        shares.append(float((found.ids[:, :, None] == best[:, None]).any(2).double().mean()))
        assert stats.scored.shape == (rounds, 8) and (stats.scored[0] == 400).all()
        assert stats.scored.sum(0).max() <= 400 + 16 * sum([32, *[75] * 5][: rounds - 1])
    assert shares == sorted(shares) and shares[0] < 0.1 and shares[3] > 0.7, shares


def test_scores_are_those_of_the_full_scan_and_ordered(device):
    queries, items, graph = made()
    found, _ = walked(device, queries, items, graph, reduce="logsumexp", k=40)
    there = score_candidates(queries.to(device), items.to(device), found.ids, reduce="logsumexp")
    assert torch.equal(found.scores, there)
    assert (found.scores[:, 1:] <= found.scores[:, :-1]).all()


def test_a_graph_that_leads_everywhere_finds_all(device):
    queries, items, _ = made()
    everywhere = NeighborGraph.from_neighbors(torch.arange(N).expand(N, N).contiguous())
    found, stats = walked(device, queries, items, everywhere, first=1, width=1, rounds=2, k=N + 3)
    with forced("reference"):
        wanted = score_topk(queries, items, N + 3)
    assert_same_bits(TopK(*(t.cpu() for t in found)), wanted)
    assert (stats.scored.sum(0) == N).all()


def test_pads_where_few_rows_were_scored(device):
    queries, items, graph = made()
    found, stats = walked(device, queries, items, graph, first=5, rounds=1, width=[], k=9)
    assert (stats.scored == 5).all()
    assert (found.ids[:, 5:] == -1).all() and (found.scores[:, 5:] == -INF).all() and (found.ids[:, :5] >= 0).all()
    nothing, stats = walked(device, queries, items, graph, first=0, k=2)
    assert (nothing.ids == -1).all() and (stats.scored == 0).all()


@pytest.mark.parametrize("users", [0, 2])
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize(("degree", "k"), [(0, 0), (2, 3)])
def test_empty_sizes(machine, device, users, count, rows, degree, k):
    graph = NeighborGraph.from_neighbors(torch.full((rows, degree), rows - 1, dtype=torch.int32, device=device))
    queries, items = torch.ones(users, count, 3, device=device), torch.ones(rows, 3, device=device)
    found, stats = explore_topk(queries, items, graph, k, seed=0, first=4, return_stats=True)
    assert found.ids.shape == (users, k) and stats.scored.shape == (4, users)
    assert (found.ids >= 0).sum() == (users * min(k, rows) if count else 0)


def test_forbidden_rows_are_passed_through_but_not_returned(machine, device):
    line = torch.arange(1, 101)  # row i leads to row i + 1 alone
    line[-1] = -1
    graph = NeighborGraph.from_neighbors(line[:, None])
    items = torch.arange(100.0)[:, None]
    queries = torch.ones(1, 1, 1)
    start = start_of_the_line()
    walk = {"first": 1, "width": 1, "rounds": 20, "k": 100}
    _, stats = walked(device, queries, items, graph, **walk)
    reached = int(stats.scored.sum())
    assert reached == min(20, 100 - start)
    odd = torch.arange(100) % 2 == 1
    wanted = [row for row in range(start, start + reached) if row % 2][::-1]
    table = ItemTable(items.to(device))
    table.remove((~odd).nonzero().flatten().to(device))
    for found, _ in (
        walked(device, queries, items, graph, mask=odd, **walk),
        walked(device, queries, items, graph, exclude=(~odd).nonzero().T, **walk),
        walked(device, queries, table, graph, **walk),
    ):
        assert found.ids[0, : len(wanted)].tolist() == wanted and (found.ids[0, len(wanted) :] == -1).all()


def start_of_the_line():
    """The one row of the first subset of 100 rows, for seed 7 and stream 0."""
    first, _ = noise.random_words(noise.seed_of_round(torch.tensor(7), 0), torch.tensor(0), torch.tensor(0))
    return int((first >> 1) * 100 >> 31)


def test_draws_follow_the_probabilities():
    """Four parts of a hundred equal rows: the first round scores one of each, the second draws one of these. Each of
    the first three parts leads to a row of its own in the last."""
    values = torch.tensor([2.0, 1.0, 0.0, -9.0])
    target = torch.tensor([300, 301, 302, -1])
    graph = NeighborGraph.from_neighbors(target.repeat_interleave(100)[:, None])
    users, items = 4000, values.repeat_interleave(100)[:, None]
    walk = {"first": 4, "width": 1, "temperature": 0.8, "seed": 5}
    before, after = (explore_topk(torch.ones(users, 1, 1), items, graph, 5, rounds=n, **walk).ids for n in (1, 2))
    drawn = [(after == row).any(1) & ~(before == row).any(1) for row in target[:3]]
    counts = torch.stack(drawn).sum(1).double()
    assert counts.sum() > 0.98 * users  # the others' row was scored before
    expected = torch.softmax(values[:3].double() / 0.8, 0) * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # 99.9 % of chi-square with 2 degrees


def test_seeds_of_every_kind(device):
    queries, items, graph = made()
    fixed = walked(device, queries, items, graph, seed=11)[0].ids
    assert torch.equal(walked(device, queries, items, graph, seed=torch.tensor(11))[0].ids, fixed)
    assert not torch.equal(walked(device, queries, items, graph, seed=12)[0].ids, fixed)
    first = walked(device, queries, items, graph, seed=torch.Generator().manual_seed(3))[0].ids
    assert torch.equal(walked(device, queries, items, graph, seed=torch.Generator().manual_seed(3))[0].ids, first)
    torch.manual_seed(5)
    drawn = [walked(device, queries, items, graph, seed=None)[0].ids for _ in range(2)]
    assert not torch.equal(*drawn)


def test_gradients_are_those_of_the_rows_returned(backend, device):
    queries, items, graph = (t.to(device) for t in made())
    bias = torch.randn(N, device=device)
    leaves = [t.clone().requires_grad_() for t in (queries, items, bias)]
    given = {**WALK, "backend": backend, "reduce": "logsumexp"}
    found = explore_topk(leaves[0], leaves[1], graph, 9, bias=leaves[2], **given)
    grads = torch.autograd.grad(found.scores.square().sum(), leaves)
    scores = score_candidates(leaves[0], leaves[1], found.ids, bias=leaves[2], backend=backend, reduce="logsumexp")
    wanted = torch.autograd.grad(scores.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_float64_is_the_references():
    queries, items, graph = made()
    found = explore_topk(queries.double(), items.double(), graph, 5, **WALK)
    assert found.scores.dtype == torch.float64
    assert torch.allclose(found.scores, score_candidates(queries.double(), items.double(), found.ids))


@pytest.mark.real_device
@pytest.mark.parametrize("differentiable", [False, True])
def test_opcheck(backend, device, differentiable):
    pytest.importorskip("expecttest", reason="torch.testing imports it for opcheck")
    queries, items, graph = (t.to(device) for t in made())
    if differentiable:
        queries, items = queries.clone().requires_grad_(), items.clone().requires_grad_()
    op = torch.ops.urm_kernels.explore_topk if differentiable else torch.ops.urm_kernels.explore_topk_no_grad
    table = Serving(items)
    seed, temperature = torch.tensor(3, device=device), torch.tensor(1.0, device=device)
    walk = (graph.neighbors, 50, [5, 5], temperature, seed, torch.arange(3, device=device))
    torch.library.opcheck(op.default, (queries, *table, 4, None, "max", None, None, *walk, False, backend))


@pytest.mark.real_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_in_one_graph_equals_eager(backend, device, dynamic):
    torch._dynamo.reset()
    queries, items, graph = (t.to(device) for t in made())

    def function(queries, items):
        return explore_topk(queries * 1.0, items, graph, 7, backend=backend, **WALK)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same_bits(compiled(queries, items), function(queries, items))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"graph": torch.zeros(N, 1).int()}, TypeError, "graph: a NeighborGraph is wanted, Tensor came"),
        (
            {"graph": NeighborGraph(torch.zeros(9, 1).int())},
            ValueError,
            "graph: neighbours of the N = 1500 rows of items are wanted, those of 9 came",
        ),
        ({"rounds": 0}, ValueError, "rounds: at least 1 is wanted, 0 came"),
        ({"width": 1.5}, TypeError, "width: an integer is wanted, 1.5 of type float came"),
        ({"width": [1]}, ValueError, "width: a number for each of 2 rounds after the first is wanted, [1] came"),
        ({"first": -1}, ValueError, "first: an integer from 0"),
        ({"temperature": 0.0}, ValueError, "temperature: a number from"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature: a number from"),
        ({"seed": 1.5}, TypeError, "seed: an integer is wanted, 1.5 of type float came"),
        ({"seed": torch.tensor([1])}, TypeError, "seed: an int64 scalar is wanted, torch.int64 [1] came"),
        ({"streams": torch.arange(2)}, ValueError, "streams: shape [B] = [3] is wanted, [2] came"),
        ({"streams": torch.zeros(3)}, TypeError, "streams: dtype torch.int64 is wanted, torch.float32 came"),
        ({"exclude": torch.full((3, 1), N)}, ValueError, "exclude: row indices from 0 to 1499"),
        ({"return_stats": 1}, TypeError, "return_stats: True or False is wanted, 1 came"),
        ({"backend": "cuda"}, ValueError, "backend: 'cuda' cannot run this call"),
    ],
)
def test_wrong_arguments(changes, error, said):
    queries, items, graph = made()
    given = {"queries": queries, "items": items, "graph": graph, "k": 5, **WALK, **changes}
    with pytest.raises(error, match=re.escape(said)):
        explore_topk(**given)
