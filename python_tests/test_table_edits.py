"""Edits of a table and who else knows its tensors: autograd, optimizers, state dicts, inference mode, files, arrays."""

import copy
import json

import numpy as np
import pytest
import torch
from support import run_python
from torch import nn

from urm_kernels import ItemTable, log_partition, score_candidates, score_topk
from urm_kernels.backends import cpu

ROWS = torch.arange(20)


def table(trainable=False, **options):
    return ItemTable(torch.arange(80.0).view(20, 4), bias=torch.zeros(20), trainable=trainable, **options)


def with_text(trainable=False):
    text = {"text": torch.ones(20, 2), "text_projection": torch.ones(2, 4)}
    return ItemTable(torch.zeros(20, 4), trainable=trainable, **text)


FUNCTIONS = {
    "score_topk": lambda queries, held: score_topk(queries, held, 3).scores,
    "score_candidates": lambda queries, held: score_candidates(queries, held, ROWS[15:]),
    "log_partition": lambda queries, held: log_partition(queries, held),
}


def differentiable_queries():
    return torch.full((1, 4), 0.01, requires_grad=True)


@pytest.mark.parametrize("grown", [False, True], ids=["as made", "after append"])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_backward_after_an_update_raises_rather_than_giving_the_gradient_of_other_rows(function, trainable, grown):
    held, queries = table(trainable), differentiable_queries()
    if grown:
        held.append(torch.ones(1, 4), bias=torch.zeros(1))
    total = FUNCTIONS[function](queries, held).sum()
    held.update(ROWS, torch.full((20, 4), 7.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    total = FUNCTIONS[function](queries, held).sum()
    total.backward()
    assert queries.grad.abs().sum() > 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_update_during_the_forward_gives_the_gradient_of_the_rows_that_were_scored_or_raises(function, monkeypatch):
    # As another thread would: after the scan, before autograd has written down what the backward will read.
    held, queries = table(), differentiable_queries()
    FUNCTIONS[function](queries, held).sum().backward()
    wanted, queries.grad = queries.grad, None
    scan, updated = getattr(cpu, function), []

    def scanned(*arguments):
        result = scan(*arguments)
        if not updated:
            updated.append(held.update(ROWS, torch.zeros(20, 4)))
        return result

    monkeypatch.setattr(cpu, function, scanned)
    try:
        FUNCTIONS[function](queries, held).sum().backward()
    except RuntimeError as error:
        assert "updated during" in str(error) or "modified" in str(error)  # noqa: PT017
        return
    assert torch.equal(queries.grad, wanted)


CHANGES = ("append", "remove", "compact")


@pytest.fixture(scope="module")
def backward_after_changes():
    """How each backward ended after rows came or went, each in a process of its own: a row that is no longer there must
    not be read."""
    out = run_python(
        f"""
        import itertools, json, os
        import torch
        from urm_kernels import ItemTable, log_partition, score_candidates, score_topk
        functions = {{
            "score_topk": lambda q, t: score_topk(q, t, 3).scores,
            "score_candidates": lambda q, t: score_candidates(q, t, torch.arange(4000, 4090)),
            "log_partition": lambda q, t: log_partition(q, t),
        }}
        def run(function, change, trainable):
            factors = torch.linspace(-1, 1, 4096 * 32).view(4096, 32)
            table = ItemTable(factors, trainable=trainable)
            table.remove(torch.arange(100))
            queries = torch.full((1, 2, 32), 0.1, requires_grad=True)
            scores = functions[function](queries, table)
            if change == "append":
                table.append(torch.full((1000, 32), 5.0))
            elif change == "remove":
                table.remove(torch.arange(4000, 4096))
            elif change == "compact":
                table.remove(torch.arange(100, 4090))
                table.compact()
            scores.sum().backward()
            return queries.grad
        def ended(*case):
            try:
                return 11 if torch.equal(run(case[0], "", case[2]), run(*case)) else 12
            except (RuntimeError, ValueError) as error:
                return 10
            except BaseException as error:
                return 13
        ends = {{}}
        for case in itertools.product(functions, {CHANGES!r}, (False, True)):
            child = os.fork()
            if child == 0:
                os._exit(ended(*case))
            ends[repr(case)] = os.waitpid(child, 0)[1]
        print(json.dumps(ends))
        """,
        OMP_NUM_THREADS="1",
    )
    words = {10 << 8: "refused", 11 << 8: "right", 12 << 8: "another gradient", 13 << 8: "another error"}
    return {case: words.get(status, f"crash: status {status}") for case, status in json.loads(out).items()}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_backward_after_rows_came_or_went_gives_the_right_gradient_or_an_error(
    backward_after_changes, function, change, trainable
):
    ended = backward_after_changes[repr((function, change, trainable))]
    assert ended in ("right", "refused"), ended
    assert ended == "right" or trainable or change == "append"


def test_an_optimizer_trains_a_table_whose_rows_it_also_updates():
    held = table(trainable=True)
    optimizer = torch.optim.SGD(held.parameters(), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        (-score_topk(torch.ones(1, 4), held, 1).scores.sum()).backward()
        optimizer.step()
        held.update(torch.tensor([step]), torch.full((1, 4), float(step)))
    assert held.factors[19].tolist() == [77.5, 78.5, 79.5, 80.5] and held.bias[19] == 1.5
    assert held.factors[2].tolist() == [2.0] * 4
    with torch.no_grad():
        assert score_topk(torch.ones(1, 4), held, 1).scores.tolist() == [[317.5]]


@pytest.mark.parametrize("source", ["factors", "text", "text_projection"])
def test_edits_of_the_sources_of_v_are_noticed_until_refresh(source):
    held, queries = with_text(), torch.ones(4)

    def calls():
        return [
            lambda: score_topk(queries, held, 1),
            lambda: log_partition(queries, held),
            lambda: score_candidates(queries, held, ROWS),
            lambda: held.update(ROWS[:1], torch.zeros(1, 4)),
            lambda: held.append(torch.zeros(1, 4), text=torch.zeros(1, 2)),
        ]

    assert score_topk(queries, held, 1).scores.item() == 8
    with torch.no_grad():
        getattr(held, source).add_(1)
    for call in calls() + calls()[:1]:
        with pytest.raises(RuntimeError, match=r"call refresh\(\)"):
            call()
    assert len(held) == 20
    held.refresh()
    assert score_topk(queries, held, 1).scores.item() == {"factors": 12, "text": 16, "text_projection": 16}[source]
    for call in calls():
        call()


def test_an_update_that_waits_does_not_hide_an_edit_of_the_sources():
    held = with_text()
    version, _ = held._log.pin()
    held.update(ROWS[:1], torch.ones(1, 4))
    held.factors.add_(1)
    held._log.unpin(version)
    with pytest.raises(RuntimeError, match=r"call refresh\(\)"):
        score_topk(torch.ones(4), held, 1)


def test_a_trainable_table_with_text_forms_v_for_gradients_and_asks_for_refresh_after_a_step():
    held = with_text(trainable=True)
    optimizer = torch.optim.SGD(held.parameters(), lr=1.0)
    (-score_topk(torch.ones(1, 4), held, 1).scores.sum()).backward()
    optimizer.step()
    assert score_topk(torch.ones(1, 4), held, 1).scores.item() > 8  # with a gradient, V is formed each time
    with torch.no_grad(), pytest.raises(RuntimeError, match="refresh"):
        score_topk(torch.ones(1, 4), held, 1)
    held.refresh()
    with torch.no_grad():
        best = score_topk(torch.ones(1, 4), held, 1).scores.item()
    assert best == score_topk(torch.ones(1, 4), held, 1).scores.item()


@pytest.mark.parametrize("trainable", [False, True])
def test_a_state_dict_goes_into_a_model_whose_table_has_other_rows(trainable):
    def model(rows):
        made = {"bias": torch.randn(rows), "ids": [f"m{rows}/{i}" for i in range(rows)]}
        return nn.ModuleDict(
            {"table": ItemTable(torch.randn(rows, 4), trainable=trainable, **made), "head": nn.Linear(4, 4)}
        )

    source, target = model(30), model(7)
    source["table"].remove(torch.tensor([3]))
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}  # as DDP names them
    assert not any(nn.ModuleDict({"module": target}).load_state_dict(state))
    queries = torch.randn(2, 4)
    got, wanted = score_topk(queries, target["table"], 40), score_topk(queries, source["table"], 40)
    assert torch.equal(got.ids, wanted.ids) and torch.equal(got.scores, wanted.scores)
    assert target["table"].rows_of(["m30/29"]).tolist() == [29] and target["table"].count() == 29
    assert len(list(target["table"].parameters())) == (2 if trainable else 0)


WRONG_STATES = {
    "row_scale": torch.ones(2),
    "bias": torch.ones(2),
    "alive": torch.full((1,), 255, dtype=torch.uint8),
    "ids": torch.arange(3),
    "factors": torch.zeros(3, 4),
}


@pytest.mark.parametrize("part", WRONG_STATES)
def test_a_state_dict_whose_parts_do_not_belong_together_is_refused(part):
    # Rows are read by address: a part that is too short must not get that far.
    held = table(row_scale=torch.ones(20), ids=torch.arange(20))
    held.remove(torch.tensor([1]))
    state = dict(held.state_dict()) | {part: WRONG_STATES[part]}
    with pytest.raises((ValueError, RuntimeError), match=part if part != "factors" else "."):
        held.load_state_dict(state)


@pytest.mark.parametrize("part", ["row_scale", "alive"])
def test_a_part_put_in_place_that_is_too_short_is_refused(part):
    held = table(row_scale=torch.ones(20))
    held.remove(torch.tensor([1]))
    setattr(held, part, WRONG_STATES[part])
    with pytest.raises(ValueError, match=part):
        score_topk(torch.ones(4), held, 3)


def test_a_state_dict_keeps_the_dtype_of_the_table_whatever_its_rows():
    for rows in (20, 21):
        held = table()
        held.load_state_dict({"factors": torch.zeros(rows, 4, dtype=torch.bfloat16), "bias": torch.zeros(rows)})
        assert held.factors.dtype == torch.float32


@pytest.mark.parametrize("made", [False, True], ids=["made outside", "made inside"])
def test_a_table_is_changed_inside_and_outside_inference_mode(made):
    with torch.inference_mode(made):
        held = with_text()
    for inside in (True, False, True, False):
        with torch.inference_mode(inside):
            row = held.append(torch.full((1, 4), 9.0), text=torch.ones(1, 2))
            held.update(row, torch.full((1, 4), 5.0))
            held.remove(row)
            held.update(torch.tensor([0]), torch.full((1, 4), 1.0))
            held.refresh()
            assert score_topk(torch.ones(4), held, 1).scores.item() == 12


@pytest.mark.parametrize("parts", [("factors",), ("bias",)])
def test_rows_that_are_one_memory_are_not_updated_one_by_one(parts):
    # As torch refuses index_put_ on an expanded tensor.
    held = ItemTable(torch.ones(1, 4).expand(20, 4), bias=torch.zeros(1).expand(20))
    fresh = {"factors": torch.zeros(1, 4), "bias": torch.ones(1)}
    with pytest.raises((ValueError, RuntimeError)):
        held.update(torch.tensor([3]), **{name: fresh[name] for name in parts})


def test_arrays_that_may_not_be_written_are_not_written(tmp_path):
    np.save(tmp_path / "items.npy", np.ones((20, 4), np.float32))
    out = run_python(f"""
        import numpy as np
        import torch
        from urm_kernels import ItemTable, score_topk
        held = ItemTable(np.load({str(tmp_path / "items.npy")!r}, mmap_mode="r"))
        assert score_topk(torch.ones(4), held, 1).ids.tolist() == [[0]]
        try:
            held.update(torch.tensor([3]), torch.full((1, 4), 2.0))
        except (ValueError, RuntimeError):
            print("refused")
        else:
            print(score_topk(torch.ones(4), held, 1).ids.tolist())
    """)
    assert out in ("refused\n", "[[3]]\n")
    assert (np.load(tmp_path / "items.npy") == 1).all()


def test_a_mapped_table_refuses_every_change_and_its_clone_takes_all(tmp_path):
    path = tmp_path / "t"
    made = table(ids=torch.arange(20))
    made.remove(torch.tensor([7]))
    made.save(path)
    kept = path.read_bytes()
    held = ItemTable.load(path, mmap=True)

    def changes(held):
        yield "update", lambda: held.update(torch.tensor([3]), torch.full((1, 4), 1e3))
        yield "append", lambda: held.append(torch.ones(1, 4), bias=torch.zeros(1), ids=torch.tensor([99]))
        yield "remove", lambda: held.remove(torch.tensor([1]))
        yield "compact", lambda: held.compact()

    for what, change in changes(held):
        with pytest.raises(RuntimeError, match=f"{what}: .* read-only; change a clone"):
            change()
    assert score_topk(torch.ones(4), held, 1).ids.tolist() == [[19]] and held.count() == 19
    for free in (held.clone(), copy.deepcopy(held), ItemTable.load(path, mmap=False)):
        for _, change in changes(free):
            change()
        assert free.count() == 19 and score_topk(torch.ones(4), free, 1).ids.tolist() == [[2]]
    held.factors.fill_(5)  # behind the table's back: this process's pages only
    held.load_state_dict(held.clone().state_dict())
    assert path.read_bytes() == kept and score_topk(torch.ones(4), ItemTable.load(path), 1).ids.tolist() == [[19]]


def test_a_mapped_table_is_saved_over_its_own_file(tmp_path):
    path = tmp_path / "t"
    table().save(path)
    held = ItemTable.load(path)
    held.save(path)
    changed = held.clone()
    changed.update(torch.tensor([0]), torch.full((1, 4), 1e3))
    changed.save(path)
    assert score_topk(torch.ones(4), held, 1).ids.tolist() == [[19]]
    assert score_topk(torch.ones(4), ItemTable.load(path), 1).ids.tolist() == [[0]]
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def test_parts_that_share_memory_are_saved_and_loaded(tmp_path):
    same, halves = torch.ones(20, 4), torch.arange(40.0)
    held = ItemTable(same, text=same, text_projection=torch.eye(4), bias=halves[:20], row_scale=halves[20:])
    held.save(tmp_path / "t")
    read = ItemTable.load(tmp_path / "t", mmap=False)
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in held.state_dict().items())
