"""Names of rows: whole numbers and strings, found again whatever they hash to and whenever they came."""

import time

import numpy as np
import pytest
import torch

from urm_kernels import ItemTable, names
from urm_kernels.names import Names

ODD = [
    "",
    "\0",
    "\0\0",
    "a",
    "a\0",
    "\0a",
    "a\0b",
    " ",
    "é",
    "e\u0301",
    "日本語",
    "😀",
    "😀😀",
    "\U0010ffff",
    "\n",
    "A",
    "x" * 5000,
]


def named(ids, **options):
    return ItemTable(torch.zeros(len(ids), 2), ids=ids, **options)


@pytest.fixture(params=[False, True], ids=["hashed", "all hashes collide"])
def collisions(request, monkeypatch):
    """With True every string has the same hash, so that only comparing them tells them apart."""
    if request.param:
        monkeypatch.setattr(names, "_hashes", lambda text, offsets: torch.full((len(offsets) - 1,), 7))
    return request.param


def test_odd_strings_are_found_and_given_back_as_they_came(collisions):
    held = named(ODD)
    assert held.to_external(torch.arange(len(ODD))).tolist() == ODD
    assert held.rows_of(ODD[::-1]).tolist() == list(range(len(ODD)))[::-1]
    for absent in ("b", "\0\0\0", "a\0b\0", "e", "日本", "\ud7ff", "x" * 4999):
        with pytest.raises(ValueError, match="is not in the table"):
            held.rows_of([absent])


def test_strings_appended_are_found_and_taken_ones_refused(collisions):
    held = named(ODD[:6])
    for name in ODD[6:10]:
        held.append(torch.zeros(1, 2), ids=[name])
    held.append(torch.zeros(len(ODD) - 10, 2), ids=ODD[10:])
    assert held.rows_of(ODD).tolist() == list(range(len(ODD)))
    for taken in ODD:
        with pytest.raises(ValueError, match=r"ids: new names are wanted"):
            held.append(torch.zeros(2, 2), ids=["fresh", taken])
    assert len(held) == len(ODD)


def test_a_string_that_comes_twice_is_refused_with_both_rows(collisions):
    for ids, words in ((["a", "b", "a"], r"'a' came twice \(rows 0 and 2\)"), (["", ""], "'' came twice")):
        with pytest.raises(ValueError, match=words):
            named(ids)
    held = named(["a"])
    with pytest.raises(ValueError, match="'n' came twice"):
        held.append(torch.zeros(3, 2), ids=["n", "m", "n"])
    assert len(held) == 1 and held.rows_of(["a"]).tolist() == [0]


@pytest.mark.parametrize("kind", ["strings", "numbers"])
def test_a_removed_name_is_gone_and_may_be_given_to_another_row(collisions, kind):
    def as_names(listed):
        return [f"n{i}" for i in listed] if kind == "strings" else torch.tensor(listed)

    held = named(as_names([0, 1, 2, 3]))
    for again in range(5):  # the same name, over and over
        row = int(held.rows_of(as_names([1])))
        held.remove(torch.tensor([row]))
        with pytest.raises(ValueError, match="is not in the table"):
            held.rows_of(as_names([1]))
        assert held.append(torch.zeros(1, 2), ids=as_names([1])).tolist() == [4 + again]
        assert held.rows_of(as_names([0, 1, 2, 3])).tolist() == [0, 4 + again, 2, 3]
    assert held.compact().tolist() == [0, -1, 1, 2, -1, -1, -1, -1, 3]
    assert held.rows_of(as_names([0, 1, 2, 3])).tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("kind", ["strings", "numbers"])
@pytest.mark.parametrize("at_once", [1, 700, 5000])
def test_names_that_come_after_a_removal_are_found_however_many_they_are(kind, at_once):
    # Beyond some thousand the index is made anew, while removed rows still lie in it.
    def as_names(first, last):
        return [f"n{i}" for i in range(first, last)] if kind == "strings" else torch.arange(first, last)

    held = named(as_names(0, 21))
    held.remove(torch.tensor([3, 20]))
    total = 1400 if at_once == 1 else 6000
    for first in range(21, total, at_once):
        count = min(at_once, total - first)
        held.append(torch.zeros(count, 2), ids=as_names(first, first + count))
    assert held.rows_of(as_names(21, total)).tolist() == list(range(21, total))
    assert held.append(torch.zeros(1, 2), ids=as_names(3, 4)).tolist() == [total]
    assert held.rows_of(as_names(3, 5)).tolist() == [total, 4]


def test_a_hundred_thousand_strings_are_found_in_seconds():
    listed = [f"item/{i * 7919}" for i in range(100_000)]
    began = time.process_time()
    held = named(listed)
    order = torch.randperm(100_000)[:20_000]
    assert torch.equal(held.rows_of([listed[i] for i in order.tolist()]), order)
    assert held.to_external(order[:1000]).tolist() == [listed[i] for i in order[:1000].tolist()]
    assert time.process_time() - began < 20


def test_numbers_at_the_ends_of_their_range_are_found():
    ids = torch.tensor([0, -1, 2**63 - 1, -(2**63), 2**32, 5])
    held = named(ids)
    assert torch.equal(held.rows_of(ids.flip(0)), torch.arange(6).flip(0))
    assert held.to_external(torch.tensor([[-1, 3], [2, -1]])).tolist() == [[-1, -(2**63)], [2**63 - 1, -1]]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (1, 2, 1), (0, 3)])
def test_names_come_and_go_in_any_shape(shape):
    rows = torch.randint(0, len(ODD), shape, generator=torch.Generator().manual_seed(1))
    strings, numbers = named(ODD), named(torch.arange(len(ODD)) * 3 - 5)
    assert torch.equal(numbers.rows_of(numbers.to_external(rows)), rows)
    external = strings.to_external(rows)
    assert external.shape == shape and external.dtype == object
    assert torch.equal(strings.rows_of(external.tolist()), rows) or shape == (0, 3)


def test_what_to_external_gives_rows_of_takes():
    held = named(ODD)
    rows = torch.tensor([[3, 1], [0, 7]])
    assert torch.equal(held.rows_of(held.to_external(rows)), rows)


@pytest.mark.parametrize("dtype", ["object", "str"])
def test_numpy_arrays_of_strings_are_strings(dtype):
    held = named(np.array(["b", "ä", ""], dtype=dtype))
    assert held.to_external(torch.tensor([1, -1, 2])).tolist() == ["ä", None, ""]
    assert held.rows_of(np.array([["ä"], ["b"]], dtype=dtype)).tolist() == [[1], [0]]


def test_pads_are_none_for_strings_and_minus_one_for_numbers():
    rows = torch.tensor([[0, -1], [-1, -1]])
    assert named(["a"]).to_external(rows).tolist() == [["a", None], [None, None]]
    assert named(torch.tensor([9])).to_external(rows).tolist() == [[9, -1], [-1, -1]]
    assert named([]).to_external(rows[1:]).tolist() == [[None, None]]
    assert named(torch.zeros(0, dtype=torch.int64)).to_external(rows[1:]).tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ("abc", TypeError, "ids: an int64 tensor or a sequence of strings"),
        (b"abc", TypeError, "ids: an int64 tensor or a sequence of strings"),
        ({"a", "b", "c"}, TypeError, "ids: an int64 tensor or a sequence of strings"),
        (5, TypeError, "ids: an int64 tensor or a sequence of strings"),
        (["a", 1, "c"], TypeError, "ids: strings are wanted, 1 of type int"),
        (["a", None, "c"], TypeError, "ids: strings are wanted"),
        (["a", b"b", "c"], TypeError, "ids: strings are wanted"),
        ([1, 2, 3], TypeError, "ids: strings are wanted"),
        (["a", "\ud800", "c"], ValueError, "ids: strings of valid Unicode"),
        (["a", "b"], ValueError, "ids: one for each of 3 rows"),
        (["a", "b", "c", "d"], ValueError, "ids: one for each of 3 rows"),
        (torch.arange(3.0), TypeError, "float32 came"),
        (torch.arange(3, dtype=torch.int32), TypeError, "int32 came"),
        (torch.arange(3)[None], ValueError, "ids: one for each of 3 rows"),
        (torch.arange(4), ValueError, "ids: one for each of 3 rows"),
    ],
)
def test_names_of_a_wrong_kind_or_number_are_refused_in_words(ids, error, words):
    with pytest.raises(error, match=words):
        ItemTable(torch.zeros(3, 2), ids=ids)


@pytest.mark.parametrize(
    ("held", "external", "error", "words"),
    [
        (["a", "b"], torch.tensor([1]), TypeError, "external"),
        (["a", "b"], [1], TypeError, "external: strings are wanted"),
        (["a", "b"], [None], TypeError, "external: strings are wanted"),
        (["a", "b"], ["\udfff"], ValueError, "external: strings of valid Unicode"),
        (["a", "b"], [["a"], ["a", "b"]], (TypeError, ValueError), "external"),
        (torch.tensor([1, 2]), ["1"], TypeError, "external: an int64 tensor"),
        (torch.tensor([1, 2]), torch.tensor([1.0]), TypeError, "external: an int64 tensor"),
        (torch.tensor([1, 2]), torch.tensor([-1]), ValueError, "id -1 is not in the table"),
        (None, torch.tensor([2]), ValueError, "external: rows from 0 to 1"),
        (None, ["a"], TypeError, "external"),
    ],
)
def test_questions_of_a_wrong_kind_are_refused_in_words(held, external, error, words):
    with pytest.raises(error, match=words):
        ItemTable(torch.zeros(2, 2), ids=held).rows_of(external)


@pytest.mark.parametrize("rows", [torch.tensor([2]), torch.tensor([2**40])])
@pytest.mark.parametrize("held", [["a", "b"], torch.tensor([1, 2])], ids=["strings", "numbers"])
def test_rows_that_do_not_exist_have_no_names(held, rows):
    with pytest.raises((ValueError, IndexError), match=r"\brow|\bindex"):
        named(held).to_external(rows)


@pytest.mark.parametrize("kind", ["strings", "numbers", None])
def test_rows_that_come_one_by_one_cost_the_same_however_many_there_are(kind):
    def cost(rows):
        """Seconds of processor time of one append to a table of so many rows, the least of several."""
        ids = {"numbers": torch.arange(rows), "strings": [f"n{i}" for i in range(rows)], None: None}[kind]
        held, times = ItemTable(torch.zeros(rows, 2), ids=ids), []
        for i in range(60):
            more = {"numbers": torch.tensor([rows + i]), "strings": [f"n{rows + i}"], None: None}[kind]
            began = time.process_time()
            held.append(torch.zeros(1, 2), ids=more)
            times.append(time.process_time() - began)
        return sorted(times)[20]

    few, many = 1000, 400_000 if kind != "strings" else 100_000
    cost(few)
    assert cost(many) < 4 * cost(few) + 50e-6


def test_names_refuse_what_does_not_join():
    with pytest.raises(TypeError, match="ids: strings are wanted, as the table has, int64 came"):
        named(["a"]).append(torch.zeros(1, 2), ids=torch.tensor([1]))
    with pytest.raises(TypeError, match="ids: int64 are wanted, as the table has, strings came"):
        named(torch.tensor([1])).append(torch.zeros(1, 2), ids=["a"])
    with pytest.raises(ValueError, match="ids: is wanted"):
        named(["a"]).append(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="ids: came, but the table has none"):
        ItemTable(torch.zeros(1, 2)).append(torch.zeros(1, 2), ids=["a"])


def test_strings_longer_than_a_piece_of_hashing_are_hashed_alike(monkeypatch):
    listed = ["", "a" * 9, "b", "c" * 30, "", "d", "ee" * 8]
    whole = Names.of([f"{i}{name}" for i, name in enumerate(listed)], len(listed)).keys()
    for piece in (1, 2, 9, 10, 31, 64):
        monkeypatch.setattr(names, "_HASHED_AT_ONCE", piece)
        assert torch.equal(Names.of([f"{i}{name}" for i, name in enumerate(listed)], len(listed)).keys(), whole)
