"""Drawn shapes, layouts, types and filters on small integers, against sorting in plain Python.

Integers make every score exact, and ties the rule.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from urm_kernels import score_topk

QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
INF = math.inf


@st.composite
def numbers(draw, shape, special=False):
    """A numpy array of small integers, half of them zero; with `special`, a few infinities and NaN."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    out = random.integers(-2, 3, shape).astype(np.float64)
    if special and draw(st.booleans()) and out.size:
        places = random.integers(0, out.size, 1 + out.size // 10)
        out.ravel()[places] = random.choice([INF, -INF, math.nan, 3.0], len(places))
    return out


@st.composite
def laid_out(draw, array, dtype, device):
    """The array as a tensor of a drawn layout: steps, order of dimensions, storage offset."""
    tensor = torch.from_numpy(np.array(array)).to(device, dtype)
    order = draw(st.permutations(range(tensor.dim())))
    steps = [draw(st.integers(1, 3)) for _ in order]
    start = [draw(st.integers(0, 2)) for _ in order]
    big = torch.full(
        [s + n * step for n, step, s in zip(tensor.shape, steps, start, strict=True)], 1, dtype=dtype, device=device
    )
    big = big.permute(order).contiguous().permute(np.argsort(order).tolist())
    cut = tuple(slice(s, s + n * step, step) for n, step, s in zip(tensor.shape, steps, start, strict=True))
    view = big[cut]
    view.copy_(tensor)
    return view


@st.composite
def calls(draw):
    users, count = draw(st.integers(0, 4)), draw(st.integers(0, 12))
    rows, r = draw(st.integers(0, 50)), draw(st.integers(0, 36))
    call = {
        "queries": draw(numbers((users, count, r), special=True)),
        "items": draw(numbers((rows, r), special=True)),
        "k": draw(st.integers(0, rows + 3)),
        "reduce": draw(st.sampled_from(["max", "sum"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    }
    if draw(st.booleans()):
        call["bias"] = draw(numbers((rows,), special=True))
    if draw(st.booleans()):
        call["query_mask"] = draw(numbers((users, count))) >= 0
    if draw(st.booleans()):
        call["mask"] = draw(numbers((users, rows) if draw(st.booleans()) else (rows,))) >= 0
        call["bitset"] = draw(st.booleans())
    if draw(st.booleans()):
        width = draw(st.integers(0, 8))
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        call["exclude"] = torch.from_numpy(random.integers(-1, max(rows, 1), (users, width)))
        call["exclude"][call["exclude"] >= rows] = -1
    return call


def product_sum(x, y):
    total = 0.0
    for a, b in zip(x, y, strict=True):
        total += a * b
    return total


def oracle(call):
    """[(score, row), ...] of each user, by the words of API.md."""
    results = []
    for user, queries in enumerate(call["queries"]):
        exists = call["query_mask"][user] if "query_mask" in call else [True] * len(queries)
        queries = [query for query, there in zip(queries.tolist(), exists, strict=True) if there]
        found = []
        if queries and call["reduce"] == "sum":
            queries = [[sum(column) for column in zip(*queries, strict=True)]]
        for row, item in enumerate(call["items"].tolist() if queries else []):
            dots = [product_sum(query, item) for query in queries]
            score = math.nan if any(map(math.isnan, dots)) else max(dots)
            if "bias" in call:
                score += float(call["bias"][row])
            mask = call.get("mask")
            allowed = mask is None or (mask[user, row] if mask.ndim == 2 else mask[row])
            allowed = allowed and not ("exclude" in call and row in call["exclude"][user].tolist())
            if allowed and not math.isnan(score):
                found.append((score + 0.0, row))
        found.sort(key=lambda pair: (-pair[0], pair[1]))
        found = found[: call["k"]]
        results.append(found + [(-INF, -1)] * (call["k"] - len(found)))
    return results


@QUIET
@given(data=st.data())
def test_score_topk_is_sorting_every_score(machine, device, data):
    def lay_out(array, dtype):
        return data.draw(laid_out(array, dtype, device))

    call = data.draw(calls())
    queries = lay_out(call["queries"], torch.float32)
    items = lay_out(call["items"], call["dtype"])
    options = {"reduce": call["reduce"]}
    if "bias" in call:
        options["bias"] = lay_out(call["bias"], data.draw(st.sampled_from([torch.float32, torch.float16])))
    if "query_mask" in call:
        options["query_mask"] = lay_out(call["query_mask"], torch.bool)
    if "mask" in call and call["bitset"]:
        packed = np.packbits(call["mask"], axis=-1, bitorder="little")
        options["mask"] = lay_out(packed, torch.uint8)
    elif "mask" in call:
        options["mask"] = lay_out(call["mask"], torch.bool)
    if "exclude" in call:
        options["exclude"] = call["exclude"].to(device)
    result = score_topk(queries, items, call["k"], **options)
    found = [list(zip(*pair, strict=True)) for pair in zip(result.scores.tolist(), result.ids.tolist(), strict=True)]
    assert found == oracle(call)
    assert not torch.signbit(result.scores[result.scores == 0]).any()


@QUIET
@given(data=st.data())
@pytest.mark.parametrize("reduce", ["max", "sum", "mean", "logsumexp"])
def test_gradients_are_those_of_the_definition(backend, device, data, reduce):
    users, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    rows, r = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    queries = data.draw(laid_out(data.draw(numbers((users, count, r))), torch.float32, device)).requires_grad_()
    items = data.draw(laid_out(data.draw(numbers((rows, r))), torch.float32, device)).requires_grad_()
    result = score_topk(queries, items, rows + 1, reduce=reduce, backend=backend)
    upstream = torch.arange(result.ids.numel()).view(result.ids.shape).float()
    result.scores.backward(upstream.to(device))
    wide, table = (t.detach().cpu().double() for t in (queries, items))
    by_query, by_row = torch.zeros_like(wide), torch.zeros_like(table)
    for user in range(users):
        for place, row in enumerate(result.ids[user, :rows].tolist()):
            dots = wide[user] @ table[row]
            weight = torch.zeros(count, dtype=torch.float64)
            if reduce == "max":
                weight[dots.tolist().index(dots.max().item())] = 1
            elif reduce == "logsumexp":
                weight = dots.softmax(0)
            else:
                weight += 1 if reduce == "sum" else 1 / count
            weight = weight * upstream[user, place].double()
            by_query[user] += weight[:, None] * table[row]
            by_row[row] += weight @ wide[user]
    assert torch.allclose(queries.grad.cpu().double(), by_query, rtol=1e-5, atol=1e-3)
    assert torch.allclose(items.grad.cpu().double(), by_row, rtol=1e-5, atol=1e-3)
