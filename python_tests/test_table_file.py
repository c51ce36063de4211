"""Hostile table files: an error in words from load, or from the first use of the names; never a crash, never a large
allocation before the file has been validated (failure case 26)."""

import contextlib
import json
import struct

import numpy as np
import pytest
import torch
from fuzz_table_file import pack, unpack
from support import run_python

from urm_kernels import ItemTable, score_topk

NAMES = ["", "é", "b\0c", "last"]


def table(**options):
    made = torch.arange(12.0).view(4, 3)
    return ItemTable(made, **options)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Bytes of a small file with strings for ids, removed rows, text and all else."""
    path = tmp_path_factory.mktemp("valid") / "t"
    whole = {"text": torch.ones(4, 2), "text_projection": torch.ones(2, 3), "bias": torch.ones(4)}
    held = table(ids=NAMES, row_scale=torch.ones(4), **whole)
    held.remove(torch.tensor([2]))
    held.save(path)
    return path.read_bytes()


@pytest.fixture
def load(tmp_path):
    """Loads bytes, in both ways, which must end alike; the table, or raises what load raised."""

    def loaded(file, **options):
        path = tmp_path / "t.safetensors"
        path.write_bytes(file)
        ends = []
        for mmap in (False, True):
            try:
                ends.append(ItemTable.load(path, mmap=mmap, **options))
            except Exception as error:
                ends.append(error)
        assert type(ends[0]) is type(ends[1]) and path.read_bytes() == file
        if isinstance(ends[1], Exception):
            raise ends[1]
        return ends[1]

    return loaded


def changed(file, change=None, metadata=None):
    """The file with its header changed by change(header), and its metadata by metadata(described)."""
    header, data = unpack(file)
    described = json.loads(header["__metadata__"]["urm_kernels"])
    if metadata is not None:
        metadata(described)
    header["__metadata__"]["urm_kernels"] = json.dumps(described)
    if change is not None:
        change(header)
    return pack(header, data)


def plain(rows=4, rank=3, version=2, **tensors):
    """A file from nothing but (dtype, shape, bytes) by name."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    described = {"format": version, "rows": rows, "rank": rank, "tensors": sorted(tensors)}
    header["__metadata__"] = {"urm_kernels": json.dumps(described)}
    return pack(header, data)


def with_strings(offsets, text=b"abc", alive=None):
    """A file of len(offsets) - 1 rows of one factor."""
    rows = len(offsets) - 1
    more = {} if alive is None else {"alive": ("U8", [-(-rows // 8)], alive)}
    factors = {"factors": ("F32", [rows, 1], bytes(4 * rows))}
    names = {
        "id_offsets": ("I64", [rows + 1], np.array(offsets, dtype=np.int64).tobytes()),
        "id_text": ("U8", [len(text)], text),
    }
    return plain(rows, 1, **factors, **names, **more)


def test_the_files_that_these_tests_damage_are_valid(load, valid):
    held = load(valid)
    assert held.count() == 3 and held.to_external(torch.arange(4)).tolist() == NAMES
    assert score_topk(torch.ones(3), held, 4).ids.tolist() == [[3, 1, 0, -1]]
    assert load(plain(factors=("F32", [4, 3], bytes(48)))).factors.shape == (4, 3)
    assert load(with_strings([0, 1, 2, 3])).rows_of(["c", "a"]).tolist() == [2, 0]


def test_a_file_cut_short_or_made_longer_at_any_place_is_refused(load, valid):
    for length in range(len(valid)):
        with pytest.raises(ValueError, match="path"):
            load(valid[:length])
    for more in (b"\0", b"\0" * 8, valid):
        with pytest.raises(ValueError, match="path"):
            load(valid + more)


def test_single_bytes_changed_anywhere_give_a_table_or_an_error_in_words(load, valid):
    header = 8 + struct.unpack("<Q", valid[:8])[0]
    for at in range(len(valid)):
        for value in {valid[at] ^ 1, valid[at] ^ 0x80, 0x30} if at < header else {valid[at] ^ 0xFF}:
            with contextlib.suppress(ValueError):
                held = load(valid[:at] + bytes([value]) + valid[at + 1 :])
                held.rows_of(["last"])
                held.to_external(torch.arange(4))


@pytest.mark.parametrize("length", [2**63, 2**63 - 1, 2**64 - 1, 2**64 - 8, 1 << 20, (1 << 20) + 8, 1 << 32, 0, 1])
def test_a_header_length_that_wraps_or_lies_outside_is_refused(load, valid, length):
    with pytest.raises(ValueError, match=r"damaged|unreadable"):
        load(struct.pack("<Q", length) + valid[8:])


@pytest.mark.parametrize("rows", [-1, 4.0, True, "4", None, [4], 2**32, 2**63, 2**64, 2**64 + 4, 10**40, float("nan")])
@pytest.mark.parametrize("key", ["rows", "rank"])
def test_sizes_in_the_metadata_that_are_no_sizes_are_refused(load, valid, key, rows):
    with pytest.raises(ValueError, match="path"):
        load(changed(valid, metadata=lambda described: described.update({key: rows})))


@pytest.mark.parametrize("size", [-1, 4.0, True, "4", None, [], 2**62, 2**63, 2**64, 2**64 + 4, 10**40, float("inf")])
@pytest.mark.parametrize("name", ["factors", "text", "text_projection", "row_scale", "alive", "id_text", "id_offsets"])
def test_sizes_in_a_shape_that_are_no_sizes_are_refused(load, valid, name, size):
    with pytest.raises(ValueError, match="path"):
        load(changed(valid, lambda header: header[name]["shape"].__setitem__(0, size)))
    with pytest.raises(ValueError, match="path"):
        load(changed(valid, lambda header: header[name]["shape"].append(size)))


@pytest.mark.parametrize(
    ("rows", "rank"), [(2**32 - 1, 2**30), (2**31, 2**33 - 1), (2**32 - 1, 2**63 - 1), (2**16, 2**46)]
)
def test_shapes_whose_product_wraps_are_refused(load, rows, rank):
    for content in (b"", bytes(4 * rows * rank % 2**64 if 4 * rows * rank % 2**64 < 100 else 16)):
        with pytest.raises(ValueError, match="path"):
            load(plain(rows, rank, factors=("F32", [rows, rank], content)))


@pytest.mark.parametrize(
    "place",
    [[0, 0], [48, 0], [-48, 0], [1, 49], [0, 48.0], [0, 47], [0], [0, 48, 48], None, "0", {}, [2**64, 2**64 + 48]],
)
def test_tensors_that_lie_outside_or_leave_gaps_or_lie_on_each_other_are_refused(load, place):
    file = plain(factors=("F32", [4, 3], bytes(48)))
    with pytest.raises(ValueError, match="path"):
        load(changed(file, lambda header: header["factors"].update(data_offsets=place)))
    two = plain(factors=("F32", [4, 3], bytes(48)), bias=("F32", [4], bytes(16)))
    for other in ([0, 16], [32, 48], [49, 65], [64, 80]):
        with pytest.raises(ValueError, match="path"):
            load(changed(two, lambda header, other=other: header["bias"].update(data_offsets=other)))


def raw(text, data=bytes(48)):
    return pack(text if isinstance(text, bytes) else text.encode(), data)


FACTORS = '"factors": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}'
SMALLER = '"factors": {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]}'
META = (
    '"__metadata__": {"urm_kernels": "{\\"format\\": 2, \\"rows\\": 4, \\"rank\\": 3, \\"tensors\\": [\\"factors\\"]}"}'
)


def test_a_key_that_comes_twice_never_gives_another_table_than_the_one_validated(load):
    assert load(raw(f"{{{FACTORS}, {META}}}")).factors.shape == (4, 3)
    for text in (
        f"{{{SMALLER}, {FACTORS}, {META}}}",
        f"{{{FACTORS}, {SMALLER}, {META}}}",
        f"{{{META}, {FACTORS}, {META}}}",
        "{" + FACTORS.replace('"shape"', '"shape": [1, 3], "shape"') + f", {META}}}",
        "{" + FACTORS.replace('"data_offsets"', '"shape": [1, 3], "data_offsets"') + f", {META}}}",
    ):
        try:
            held = load(raw(text))
        except ValueError:
            continue
        assert held.factors.shape == (4, 3) and score_topk(torch.ones(3), held, 1).ids.tolist() == [[0]]


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"\xff\xfe\x00",
        b'{"\xff": 1}',
        b'{"\xed\xa0\x80": 1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": NaN}',
        f"{{{FACTORS.replace('[4, 3]', '[NaN, 3]')}, {META}}}".encode(),
        f"{{{FACTORS.replace('48', 'Infinity')}, {META}}}".encode(),
        f"{{{FACTORS}, {META}, {META[:-1]}".encode(),
        f"{{{FACTORS}, {META}}} {{}}".encode(),
        f"{{{FACTORS}, {META}}}".encode("utf-16"),
        f"{{{FACTORS}, {META}}}".encode("utf-32"),
        b"\xef\xbb\xbf" + f"{{{FACTORS}, {META}}}".encode(),
        f"{{{FACTORS}, {META}}}\0".encode(),
    ],
    ids=lambda header: repr(header[:20]),
)
def test_headers_that_are_no_json_of_a_table_are_refused(load, header):
    with pytest.raises(ValueError, match="path"):
        load(raw(header))


@pytest.mark.parametrize(
    "described",
    [
        {"format": 2.0},
        {"format": True},
        {"format": "2"},
        {"format": None},
        {"format": [2]},
        {"format": 0},
        {"format": 5},
        {"cell_rows": 64},
        {"cell_rows": -32},
        {"cell_rows": 33},
        {"cell_rows": True},
        {"changed": "0"},
        {"changed": -1},
        {"tensors": None},
        {"tensors": "factors"},
        {"tensors": {}},
        {"tensors": []},
        {"tensors": [["factors"]]},
        {"tensors": ["factors", "factors"]},
        {"tensors": [1]},
    ],
)
def test_metadata_of_wrong_types_is_refused(load, described):
    file = plain(factors=("F32", [4, 3], bytes(48)))
    with pytest.raises(ValueError, match="path"):
        load(changed(file, metadata=lambda held: held.update(described)))


@pytest.mark.parametrize("text", [None, 1, [], {}, "", "null", "[1]", "{", "{}", "[" * 50_000, "\ud800"])
def test_metadata_that_is_no_description_is_refused(load, text):
    with pytest.raises(ValueError, match="path"):
        load(changed(plain(), lambda header: header["__metadata__"].update(urm_kernels=text)))
    for metadata in (None, 1, [], "x", {}):
        with pytest.raises(ValueError, match="path"):
            load(changed(plain(), lambda header, metadata=metadata: header.update(__metadata__=metadata)))


@pytest.mark.parametrize("dtype", ["I64", "F16", "f32", "F8_E5M2", "BOOL", "", None, 1, ["F32"], {}])
def test_dtypes_that_the_part_cannot_have_are_refused(load, dtype):
    with pytest.raises(ValueError, match="path"):
        load(changed(plain(factors=("F32", [4, 3], bytes(48))), lambda header: header["factors"].update(dtype=dtype)))


def test_parts_that_do_not_belong_together_are_refused(load):
    factors = {"factors": ("F32", [4, 3], bytes(48))}
    for more in (
        {"text": ("F32", [4, 2], bytes(32))},
        {"text_projection": ("F32", [2, 3], bytes(24))},
        {"text": ("F32", [4, 2], bytes(32)), "text_projection": ("F32", [1, 3], bytes(12))},
        {"text": ("F32", [3, 2], bytes(24)), "text_projection": ("F32", [2, 3], bytes(24))},
        {"id_text": ("U8", [2], b"ab")},
        {"id_offsets": ("I64", [5], bytes(40))},
        {"ids": ("I64", [4], bytes(32)), "id_offsets": ("I64", [5], bytes(40)), "id_text": ("U8", [0], b"")},
        {"ids": ("I64", [3], bytes(24))},
        {"alive": ("U8", [2], bytes(2))},
        {"encoded": ("F32", [4, 3], bytes(48))},
        {"surplus": ("F32", [4], bytes(16))},
    ):
        with pytest.raises(ValueError, match="path"):
            load(plain(**factors, **more))
    with pytest.raises(ValueError, match="path"):
        load(plain(bias=("F32", [4], bytes(16))))


LARGE = 2**63 - 1
OFFSETS = {
    "descends": [0, 2, 1, 3],
    "starts late": [1, 1, 2, 3],
    "starts early": [-1, 1, 2, 3],
    "ends late": [0, 1, 2, 4],
    "ends early": [0, 1, 2, 2],
    "far outside": [0, 1 << 40, 1 << 41, 3],
    "one far outside": [0, 1, 1 << 62, 3],
    "differences wrap": [0, LARGE, -LARGE - 1, -1, 3],
    "all negative": [-4, -3, -2, -1],
}


USES = {
    "rows_of": "table.rows_of(['b'])",
    "to_external": "table.to_external(torch.arange(len(table)))",
    "append": "table.append(torch.zeros(1, 1), ids=['new'])",
    "compact": "table.compact()",
}


@pytest.fixture(scope="module")
def first_uses(tmp_path_factory):
    """How each first use of each file's names ended, each in a process of its own, with little memory: what a damaged
    file says must not become a size or an address."""
    folder = tmp_path_factory.mktemp("offsets")
    for name, offsets in OFFSETS.items():
        (folder / name).write_bytes(with_strings(offsets, alive=b"\x01"))
    said = run_python(
        f"""
        import json, os, resource
        import torch
        from urm_kernels import ItemTable
        with open("/proc/self/statm") as numbers:
            held = int(numbers.read().split()[0]) * resource.getpagesize()
        ends = {{}}
        for name in {list(OFFSETS)!r}:
            for use, code in {USES!r}.items():
                child = os.fork()
                if child == 0:
                    resource.setrlimit(resource.RLIMIT_AS, (held + (256 << 20), resource.RLIM_INFINITY))
                    table = ItemTable.load(os.path.join({str(folder)!r}, name), mmap=False)
                    try:
                        exec(code)
                    except ValueError:
                        os._exit(10)
                    except BaseException:
                        os._exit(11)
                    os._exit(12)
                ends[name + "/" + use] = os.waitpid(child, 0)[1]
        print(json.dumps(ends))
        """,
        OMP_NUM_THREADS="1",
    )
    words = {10 << 8: "refused", 11 << 8: "another error", 12 << 8: "no error"}
    return {case: words.get(status, f"crash: status {status}") for case, status in json.loads(said).items()}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_of_names_that_descend_or_lie_outside_are_refused_at_first_use(first_uses, name, use):
    ended = first_uses[f"{name}/{use}"]
    # Strings that can be read without looking at all offsets may be given.
    harmless = use == "to_external" and min(OFFSETS[name]) >= 0 and max(OFFSETS[name]) <= 3 and name != "descends"
    assert ended == "refused" or (harmless and ended == "no error"), ended


def test_names_that_are_no_utf8_or_come_twice_are_refused_at_first_use(load):
    held = load(with_strings([0, 1, 2, 3], b"a\xff\x80"))
    assert held.to_external(torch.tensor([0])).tolist() == ["a"]
    with pytest.raises(ValueError, match="utf-8"):
        held.to_external(torch.tensor([1]))
    held = load(with_strings([0, 1, 2, 3], b"aba"))
    for _ in range(2):
        with pytest.raises(ValueError, match="'a' came twice"):
            held.rows_of(["b"])
    twice = np.array([5, 6, 5, 7], dtype=np.int64).tobytes()
    held = load(plain(factors=("F32", [4, 3], bytes(48)), ids=("I64", [4], twice)))
    with pytest.raises(ValueError, match="5 came twice"):
        held.rows_of(torch.tensor([6]))
    assert score_topk(torch.ones(3), held, 1).ids.tolist() == [[0]]  # which asks no names


@pytest.mark.parametrize("names", [None, "ids"])
def test_files_of_format_1_still_load(load, names):
    parts = {"factors": ("F32", [4, 3], np.arange(12, dtype=np.float32).tobytes()), "bias": ("F32", [4], bytes(16))}
    if names:
        parts["ids"] = ("I64", [4], np.array([9, 8, 7, 6], dtype=np.int64).tobytes())
    held = load(plain(version=1, **parts))
    assert score_topk(torch.ones(3), held, 2).ids.tolist() == [[3, 2]] and held.count() == 4
    assert held.rows_of(torch.tensor([3 if names is None else 6])).tolist() == [3]
