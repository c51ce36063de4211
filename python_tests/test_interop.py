"""Arrays of other libraries: taken as they lie, given back in their kind, or refused in words."""

import numpy as np
import pytest
import torch

from urm_kernels import ItemTable, TopK, log_partition, score_candidates, score_topk
from urm_kernels.interop import as_tensor, in_kind

RANDOM = np.random.default_rng(0)
QUERIES = RANDOM.standard_normal((3, 2, 8), dtype=np.float32)
ITEMS = RANDOM.standard_normal((40, 8), dtype=np.float32)
OPTIONS = {
    "projection": np.eye(8, dtype=np.float32)[::-1].copy(),  # exact in whatever order torch adds
    "query_mask": np.array([[True, False], [True, True], [False, True]]),
    "bias": RANDOM.standard_normal(40, dtype=np.float32),
    "mask": RANDOM.random((3, 40)) < 0.7,
    "exclude": np.array([[1, 2, -1], [4, 4, 39], [-1, -1, -1]]),
}
CANDIDATES = np.array([[3, -1, 3, 39], [0, 1, 2, 3], [5, 5, 5, 5]])
TEMPERATURE = np.array(0.5, dtype=np.float32)


class Foreign:
    """An array that has nothing but the protocol; it counts how often it was exported."""

    def __init__(self, tensor):
        self.tensor, self.exports = tensor, 0

    def __dlpack__(self, **options):
        self.exports += 1
        return self.tensor.__dlpack__(**{name: value for name, value in options.items() if name == "stream"})

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def of_numpy(array):
    return torch.from_numpy(np.array(array))


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


KINDS = {
    "plain": lambda array: array,
    "read-only": read_only,
    "not contiguous": lambda array: np.stack([array, ~array if array.dtype == bool else -array], -1)[..., 0],
    "transposed": lambda array: np.ascontiguousarray(array.T).T,
    "broadcast": lambda array: np.broadcast_to(array, array.shape),
    "protocol alone": lambda array: Foreign(of_numpy(array)),
    "tensor": of_numpy,
}


def calls(kind, names):
    """Results of every scoring function, the named options being of a kind of array and all else tensors."""

    def made(name, array):
        return KINDS[kind](array) if name in names else of_numpy(array)

    queries, items = made("queries", QUERIES), made("items", ITEMS)
    options = {name: made(name, array) for name, array in OPTIONS.items()}
    plain = {name: value for name, value in options.items() if name not in ("mask", "exclude")}
    return [
        *score_topk(queries, items, 9, **options),
        score_candidates(queries, items, made("candidates", CANDIDATES), **plain),
        log_partition(queries, items, **options),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["queries", "items", "candidates", *OPTIONS, "all"])
def test_every_argument_may_be_an_array_of_any_kind(kind, name):
    names = ("queries", "items", "candidates", *OPTIONS) if name == "all" else (name,)
    for found, wanted in zip(calls(kind, names), calls("tensor", ()), strict=True):
        assert isinstance(found, torch.Tensor) and torch.equal(found, wanted)


def test_a_temperature_may_be_an_array_without_dimensions_as_a_tensor_may():
    wanted = log_partition(of_numpy(QUERIES), of_numpy(ITEMS), temperature=0.5)
    for given in (np.float32(0.5), np.float64(0.5), TEMPERATURE, read_only(TEMPERATURE), Foreign(torch.tensor(0.5))):
        assert torch.equal(log_partition(QUERIES, ITEMS, temperature=given), wanted), type(given)


def test_bitsets_of_numpy_are_lowest_bit_first():
    given = np.packbits(OPTIONS["mask"], axis=1, bitorder="little")
    found, wanted = (score_topk(QUERIES, ITEMS, 40, mask=mask) for mask in (given, OPTIONS["mask"]))
    assert torch.equal(found.ids, wanted.ids)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_widths_of_numpy(dtype):
    found = score_topk(QUERIES.astype(dtype), ITEMS.astype(dtype), 5, bias=OPTIONS["bias"].astype(dtype))
    tensors = [of_numpy(array.astype(dtype)) for array in (QUERIES, ITEMS, OPTIONS["bias"])]
    wanted = score_topk(tensors[0], tensors[1], 5, bias=tensors[2])
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.scores, wanted.scores)


def test_bfloat16_through_dlpack():
    items = of_numpy(ITEMS).bfloat16()
    found = score_topk(QUERIES, Foreign(items), 5)
    assert torch.equal(found.scores, score_topk(of_numpy(QUERIES), items, 5).scores)


def test_no_copy_is_made_and_later_edits_are_seen(device):
    array = ITEMS.copy()
    for given in (array, read_only(array), array[::2], array.T, np.broadcast_to(array[:1], (9, 8))):
        taken = as_tensor("items", given)
        assert taken.data_ptr() == given.__array_interface__["data"][0]
        assert taken.shape == given.shape
        assert [stride * 4 for stride in taken.stride()] == list(given.strides)
    taken = as_tensor("items", array)
    array[0, 0] = 77.0
    assert taken[0, 0] == 77.0
    foreign = Foreign(torch.zeros(3))
    assert as_tensor("bias", foreign).data_ptr() == foreign.tensor.data_ptr() and foreign.exports == 1
    tensor = torch.zeros(3, device=device, requires_grad=True)
    assert as_tensor("bias", tensor) is tensor
    for other in (None, 3, [1.0], "text"):
        assert as_tensor("bias", other) is other


def test_read_only_arrays_are_left_alone_and_nothing_warns(recwarn):
    given = [read_only(array) for array in (QUERIES, ITEMS)]
    options = {name: read_only(array) for name, array in OPTIONS.items()}
    score_topk(*given, 5, **options)
    log_partition(*given, **options)
    score_candidates(*given, read_only(CANDIDATES))
    assert not list(recwarn)
    assert np.array_equal(given[0], QUERIES) and np.array_equal(options["exclude"], OPTIONS["exclude"])


def test_memory_maps_and_subclasses_are_arrays(tmp_path):
    class Sub(np.ndarray):
        pass

    path = tmp_path / "items"
    ITEMS.tofile(path)
    mapped = np.memmap(path, dtype=np.float32, mode="r", shape=(40, 8))
    wanted = score_topk(of_numpy(QUERIES), of_numpy(ITEMS), 5)
    for items in (mapped, ITEMS.view(Sub), read_only(ITEMS).view(Sub)):
        assert torch.equal(score_topk(QUERIES, items, 5).ids, wanted.ids)


def test_a_masked_array_is_not_taken_without_its_mask():
    masked = np.ma.masked_array(ITEMS, mask=ITEMS > 0)
    with pytest.raises(TypeError, match=r"^items: "):
        score_topk(QUERIES, masked, 5)


def changed(dtype=None, **changes):
    if dtype is not None:
        return {name: array.astype(dtype) for name, array in changes.items()}
    return changes


WRONG = [
    changed(queries=QUERIES[::-1]), changed(items=ITEMS[:, ::-1]), changed(bias=OPTIONS["bias"][::-1]),
    changed(mask=OPTIONS["mask"][:, ::-1]), changed(exclude=OPTIONS["exclude"][::-1]),
    changed(">f4", queries=QUERIES), changed(np.longdouble, items=ITEMS), changed(object, bias=OPTIONS["bias"]),
    changed(items=np.array([["a"]])), changed(exclude=np.zeros((3, 1), "datetime64[s]")),
    changed(bias=np.zeros(40, [("x", "f4")])), changed(np.int32, exclude=OPTIONS["exclude"]),
    changed(np.uint64, exclude=np.zeros((3, 1))), changed(np.uint16, queries=QUERIES), changed(np.int64, items=ITEMS),
    changed(np.complex64, projection=OPTIONS["projection"]), changed(np.uint8, query_mask=OPTIONS["query_mask"]),
    changed(np.float32, mask=OPTIONS["mask"]), changed(queries=Foreign(torch.ones(3, 2, 8).long())),
]  # fmt: skip


@pytest.mark.parametrize("changes", WRONG, ids=lambda changes: next(iter(changes)))
def test_arrays_that_torch_cannot_take_are_refused_in_words(changes):
    given = {"queries": QUERIES, "items": ITEMS, **changes}
    with pytest.raises(TypeError, match=f"^{next(iter(changes))}: "):
        score_topk(given.pop("queries"), given.pop("items"), 3, **given)


class Broken:
    """What an array that cannot be exported does."""

    def __init__(self, error):
        self.error = error

    def __dlpack__(self, **options):
        raise self.error

    def __dlpack_device__(self):
        return (1, 0)


@pytest.mark.parametrize("error", [BufferError("no"), RuntimeError("no"), ValueError("no"), TypeError("no")], ids=repr)
def test_an_export_that_fails_is_refused_in_words(error):
    with pytest.raises(TypeError, match=r"^bias: .*Broken cannot be taken as a tensor: .*no"):
        score_topk(QUERIES, ITEMS, 3, bias=Broken(error))


def test_an_array_without_a_device_is_refused_in_words():
    class Half:
        def __dlpack__(self, **options):
            return torch.zeros(40).__dlpack__()

    with pytest.raises(TypeError, match=r"^bias: .*cannot be taken as a tensor"):
        score_topk(QUERIES, ITEMS, 3, bias=Half())


@pytest.mark.parametrize("value", [[1, 2], (1, 2), 3, None, "12"], ids=repr)
def test_what_is_no_array_is_refused_in_words(value):
    with pytest.raises(TypeError, match=r"^candidates: .*int64 is wanted, .* came"):
        score_candidates(QUERIES, ITEMS, value)


def test_arrays_of_the_cpu_beside_another_device_are_refused_in_words(device):
    if device.type == "cpu":
        pytest.skip("there is no other device")
    queries, items = of_numpy(QUERIES).to(device), of_numpy(ITEMS).to(device)
    for name in ("bias", "mask", "exclude", "query_mask"):
        with pytest.raises(ValueError, match=f"^{name}: is on cpu"):
            score_topk(queries, items, 3, **{name: OPTIONS[name]})
    with pytest.raises(ValueError, match=r"^items: is on cpu"):
        log_partition(queries, ITEMS)
    with pytest.raises(ValueError, match=r"^candidates: is on cpu"):
        score_candidates(queries, items, CANDIDATES)


@pytest.mark.real_device  # a stand-in has no .numpy()
def test_results_in_the_kind_of_an_array(device):
    queries = of_numpy(QUERIES).to(device).requires_grad_()
    result = score_topk(queries, of_numpy(ITEMS).to(device), 5)
    for array in (QUERIES, read_only(QUERIES), QUERIES.view(np.ndarray)):
        found = result.like(array)
        assert type(found) is TopK and all(type(part) is np.ndarray for part in found)
        assert found.scores.dtype == np.float32 and found.ids.dtype == np.int64
        assert np.array_equal(found.scores, result.scores.detach().cpu().numpy())
        assert np.array_equal(found.ids, result.ids.cpu().numpy())
    if device.type == "cpu":
        assert found.ids.__array_interface__["data"][0] == result.ids.data_ptr()
    same = result.like(queries)
    assert same.scores is result.scores and same.scores.requires_grad and same.ids is result.ids
    assert in_kind(None, QUERIES) is None
    alone = in_kind(log_partition(queries, of_numpy(ITEMS).to(device)), QUERIES)
    assert type(alone) is np.ndarray and alone.shape == (3,)
    with pytest.raises(TypeError, match=r"^like: .* wanted, list came"):
        result.like([1, 2])
    with pytest.raises(TypeError, match=r"^like: .* wanted, Foreign came"):
        result.like(Foreign(torch.zeros(3)))


def test_a_subclass_of_arrays_gets_arrays():
    class Sub(np.ndarray):
        pass

    found = score_topk(QUERIES, ITEMS, 5).like(QUERIES.view(Sub))
    assert isinstance(found.scores, np.ndarray) and isinstance(found.ids, np.ndarray)


def test_tables_take_arrays():
    names = np.arange(40) * 3 + 1
    table = ItemTable(read_only(ITEMS), bias=OPTIONS["bias"], ids=names)
    wanted = score_topk(of_numpy(QUERIES), of_numpy(ITEMS), 5, bias=of_numpy(OPTIONS["bias"]))
    assert torch.equal(score_topk(QUERIES, table, 5).ids, wanted.ids)
    assert torch.equal(table.to_external(wanted.ids), wanted.ids * 3 + 1)


def test_jax():
    numpy = pytest.importorskip("jax.numpy")
    queries, items = numpy.asarray(QUERIES), numpy.asarray(ITEMS)
    result, wanted = score_topk(queries, items, 5), score_topk(of_numpy(QUERIES), of_numpy(ITEMS), 5)
    assert torch.equal(result.ids, wanted.ids) and torch.equal(result.scores, wanted.scores)
    found = result.like(queries)
    assert type(found.scores) is type(queries) and np.array_equal(np.asarray(found.scores), wanted.scores.numpy())
    halves = score_topk(queries.astype(numpy.bfloat16), items.astype(numpy.bfloat16), 5)
    wanted = score_topk(of_numpy(QUERIES).bfloat16(), of_numpy(ITEMS).bfloat16(), 5)
    assert torch.equal(halves.ids, wanted.ids)
    masked = score_topk(queries, items, 5, mask=numpy.asarray(OPTIONS["mask"]))
    assert torch.equal(masked.ids, score_topk(of_numpy(QUERIES), of_numpy(ITEMS), 5, mask=OPTIONS["mask"]).ids)
