"""Tensors of another device than the CPU: none of the CPU's is mixed in, and none is taken.

Collected where URM_TEST_DEVICE names one.
"""

import pytest
import torch
from support import assert_same_bits

from urm_kernels import score_topk


def test_the_device_is_one_of_its_own(device):
    # What the other tests lean on, the stand-in device above all.
    here, there = torch.ones(3), torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    view = there[1:]
    view += 1
    assert there.tolist() == [1.0, 2.0, 2.0] and there.cpu().device.type == "cpu" and there.to(device) is there


def test_results_and_gradients_stay_on_the_device(device):
    queries = torch.randn(2, 3, 4, device=device, requires_grad=True)
    items = torch.randn(9, 4, device=device, requires_grad=True)
    result = score_topk(queries, items, 5)
    result.scores.sum().backward()
    assert {t.device.type for t in (*result, queries.grad, items.grad)} == {device.type}
    assert_same_bits(result, score_topk(queries.detach().cpu(), items.detach().cpu(), 5))


GIVEN = {
    "items": torch.ones(5, 4),
    "projection": torch.ones(4, 4),
    "query_mask": torch.ones(2, 3, dtype=torch.bool),
    "bias": torch.ones(5),
    "mask": torch.ones(5, dtype=torch.bool),
    "exclude": torch.zeros(2, 1, dtype=torch.int64),
}


@pytest.mark.parametrize("name", GIVEN)
def test_an_argument_left_on_the_cpu_is_refused_in_words(device, name):
    given = {"items": GIVEN["items"].to(device), name: GIVEN[name]}
    with pytest.raises(ValueError, match=f"^{name}: is on cpu, queries are on {device}.*move one of them"):
        score_topk(torch.ones(2, 3, 4, device=device), given.pop("items"), 2, **given)


def test_the_cpu_backend_is_refused_with_the_reason(device):
    with pytest.raises(ValueError, match=f"^backend: 'cpu' cannot run this call: tensors are on {device}"):
        score_topk(torch.ones(4, device=device), torch.ones(5, 4, device=device), 2, backend="cpu")


@pytest.mark.real_device  # the stand-in adds as the CPU's index_put does, in no order
def test_runs_agree_however_many_users_add_to_a_row(device):
    # 4000 users add to nine rows: in another order, float32 sums of this length differ.
    items = torch.randn(9, 4, device=device, requires_grad=True)
    queries = torch.randn(4000, 1, 4, device=device)
    grads = []
    for _ in range(5):
        score_topk(queries, items, 3).scores.sum().backward()
        grads.append(items.grad)
        items.grad = None
    assert all(torch.equal(grad, grads[0]) for grad in grads)
