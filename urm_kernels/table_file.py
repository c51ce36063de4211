"""An ItemTable's file: one .safetensors file, whose description is validated before anything is allocated.

A file may come from anywhere. Its header is read by hand first, with a limit on its size; every tensor's dtype, shape
and place must be what the table's own metadata says and lie within the file. Only then safetensors reads or maps it.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from os import PathLike
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from . import checks
from .backends import codes as formats

FORMAT = 4  # of the metadata; 3 had no cells, 2 no codes, 1 no removed rows, texts, scales or strings: all are read
_MAX_HEADER = 1 << 16  # bytes; a table's own is below 4 KiB

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_FLOATS = ("F64", "F32", "F16", "BF16")

Path = str | PathLike[str]


class Facts(NamedTuple):
    """Of a table packed in blocks: rows of a cell (0: there are none), and rows changed since they were clustered."""

    cell_rows: int
    changed: int


NO_FACTS = Facts(0, 0)


class _Wanted(NamedTuple):
    dtypes: tuple[str, ...]
    shape: list[int | None]  # None: any size


def write(path: Path, tensors: dict[str, Tensor], rows: int, rank: int, facts: Facts) -> None:
    """Writes a table's tensors, every bit of them; the file appears whole or not at all."""
    from safetensors.torch import save_file

    description = {"format": FORMAT, "rows": rows, "rank": rank, **facts._asdict(), "tensors": sorted(tensors)}
    partial = f"{os.fspath(path)}.{os.getpid()}.partial"
    try:
        save_file(
            _apart({name: tensor.detach().contiguous() for name, tensor in tensors.items()}),
            partial,
            metadata={"urm_kernels": json.dumps(description)},
        )
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory with one before, which the format refuses."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        kept[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return kept


def read(path: Path, *, mmap: bool, device: str | torch.device) -> tuple[dict[str, Tensor], Facts]:
    """The tensors of a table's file. With mmap, on the CPU, they are a private map of it: pages are read when touched.

    Raises ValueError in words for a file that is damaged or is no table, OSError for one that cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    names, facts = validated(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"path: {path} is damaged or no safetensors file: {error}") from error
    if not mmap and torch.device(device).type == "cpu":
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if "code_rotation" in tensors and not (tensors["code_rotation"].abs() == 1).all():
        raise ValueError(f"path: {path}: code_rotation holds other numbers than 1 and -1")
    return tensors, facts


def validated(path: Path) -> tuple[list[str], Facts]:
    """Names of the tensors of a file that is a table's; allocates no more than the header's size limit."""
    header, data_bytes = _header(path)
    metadata = header.pop("__metadata__", None)
    text = metadata.get("urm_kernels") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"path: {path} is a safetensors file, but not of an ItemTable (no urm_kernels metadata)")
    described = _parsed(path, text, "urm_kernels metadata")
    version, rows, rank = (described.get(key, -1) for key in ("format", "rows", "rank"))
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(f"path: {path} has table format {version!r}; this version reads formats 1 to {FORMAT}")
    if not (_is_size(rows) and _is_size(rank) and rows <= checks.MAX_ROWS):
        raise ValueError(f"path: {path} claims {rows!r} rows of {rank!r} factors")
    names = described.get("tensors")
    if not isinstance(names, list) or sorted(header) != names:
        raise ValueError(f"path: {path} holds tensors {_few(sorted(header))}, its metadata names {_few(names)}")
    cell_rows, changed = described.get("cell_rows", 0), described.get("changed", 0)
    if not _is_cell(cell_rows) or not _is_size(changed) or (cell_rows > 0) != ("code_order" in header):
        raise ValueError(f"path: {path} claims cells of {cell_rows!r} rows")
    wanted = _wanted(rows, rank, cell_rows)
    if "factors" not in header or not set(header) <= set(wanted):
        raise ValueError(f"path: {path} holds tensors {_few(names)}; factors, and of {sorted(wanted)} any, are wanted")
    _check_pairs(path, set(header))
    shapes = {name: _check_tensor(path, name, header[name], wanted[name], data_bytes) for name in names}
    if "text" in shapes and shapes["text"][1] != shapes["text_projection"][0]:
        raise ValueError(f"path: {path}: text {shapes['text']} does not fit its projection {shapes['text_projection']}")
    if "code_blocks" in shapes:
        block, fine = shapes["code_blocks"][1], shapes["code_fine"][1] if "code_fine" in shapes else None
        if not 1 <= rank <= formats.MAX_WIDTH or not formats.are_shapes(block, fine, rank):
            beside = "" if fine is None else f" beside rows of {fine} bytes"
            raise ValueError(f"path: {path}: blocks of {block} bytes{beside} are no codes of rows of width {rank}")
        if header["factors"]["dtype"] == "F64":
            raise ValueError(f"path: {path} holds codes that no table has")
    return names, Facts(cell_rows, changed)


def _wanted(rows: int, rank: int, cell_rows: int = 0) -> dict[str, _Wanted]:
    coded = rows // formats.BLOCK * formats.BLOCK
    cells = coded // max(cell_rows, 1)
    return {
        "factors": _Wanted((*_FLOATS, "F8_E4M3"), [rows, rank]),
        "text": _Wanted(_FLOATS, [rows, None]),
        "text_projection": _Wanted(_FLOATS, [None, rank]),
        "row_scale": _Wanted(_FLOATS, [rows]),
        "bias": _Wanted(_FLOATS, [rows]),
        "alive": _Wanted(("U8",), [-(-rows // 8)]),
        "ids": _Wanted(("I64",), [rows]),
        "id_text": _Wanted(("U8",), [None]),
        "id_offsets": _Wanted(("I64",), [rows + 1]),
        "code_rotation": _Wanted(
            ("F32",), [formats.STEPS[rank == formats.hadamard_size(rank)], formats.hadamard_size(rank)]
        ),
        "code_reference": _Wanted(("F32",), [2]),
        "code_blocks": _Wanted(("U8",), [rows // formats.BLOCK, None]),
        "code_fine": _Wanted(("U8",), [coded, None]),
        "code_order": _Wanted(("I32",), [coded, 2]),
        "code_bias": _Wanted(("F32",), [coded]),
        "code_cells": _Wanted(("U8",), [-(-cells // formats.BLOCK), formats.block_bytes(rank, formats.CELL_BITS)]),
        "code_cell_reference": _Wanted(("F32",), [2]),
        "code_cell_most": _Wanted(("F32",), [cells]),
    }


def wanted_shapes(rows: int, rank: int) -> dict[str, list[int | None]]:
    """Sizes of every part of a table, None where any will do."""
    return {name: wanted.shape for name, wanted in _wanted(rows, rank).items()}


def _check_pairs(path: Path, names: set[str]) -> None:
    for one, other in (("text", "text_projection"), ("id_text", "id_offsets")):
        if (one in names) != (other in names):
            raise ValueError(f"path: {path}: {one} and {other} come together or not at all")
    codes = {"code_rotation", "code_reference", "code_blocks"}
    if names & {*codes, "code_fine"} and not codes <= names:
        raise ValueError(f"path: {path}: {', '.join(sorted(codes))} come together or not at all")
    cells = {"code_order", "code_cells", "code_cell_reference"}
    biases = {"code_bias", "code_cell_most"} if "bias" in names else set()
    has_cells = bool(names & {*cells, "code_bias", "code_cell_most"})
    if has_cells and (not (cells | biases | codes) <= names or names & {"code_bias", "code_cell_most"} != biases):
        raise ValueError(f"path: {path}: {', '.join(sorted(cells | biases))} come together or not at all")
    if "ids" in names and "id_text" in names:
        raise ValueError(f"path: {path}: ids are numbers or strings, not both")


def _check_tensor(path: Path, name: str, entry: Any, wanted: _Wanted, data_bytes: int) -> list[int]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in wanted.dtypes:
        raise ValueError(f"path: {path}: {name} has dtype {dtype!r}, one of {', '.join(wanted.dtypes)} is wanted")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise ValueError(f"path: {path}: {name} has shape {shape!r}")
    fits = len(shape) == len(wanted.shape) and all(w in (None, s) for w, s in zip(wanted.shape, shape, strict=True))
    if not fits:
        raise ValueError(f"path: {path}: {name} has shape {shape}, its metadata says {wanted.shape}")
    if not isinstance(place, list) or len(place) != 2 or not all(_is_size(at) for at in place):
        raise ValueError(f"path: {path}: {name} lies at {place!r}")
    size = _DTYPES[dtype].itemsize
    for length in shape:
        size *= length
    if place[1] - place[0] != size or place[1] > data_bytes:
        raise ValueError(f"path: {path}: {name} of {size} bytes lies at {place} of {data_bytes} bytes")
    return shape


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(the parsed header, bytes of data behind it)."""
    kind = os.stat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a pipe would be waited for; a directory is open's to refuse
        raise ValueError(f"path: {path} is no regular file")
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"path: {path} is damaged or no safetensors file: {total} bytes long")
        (length,) = struct.unpack("<Q", start)
        if length > min(_MAX_HEADER, total - 8):
            raise ValueError(f"path: {path} is damaged or no table: a header of {length} bytes in {total}")
        text = file.read(length)
    return _parsed(path, text, "header"), total - 8 - length


def _parsed(path: Path, text: str | bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise ValueError(f"path: {path} has an unreadable {what}: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"path: {path} has an unreadable {what}: an object is wanted, {type(parsed).__name__} came")
    return parsed


def _few(value: Any) -> str:
    """For a message, which a file must not make long."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _is_cell(rows: Any) -> TypeGuard[int]:
    return _is_size(rows) and rows % formats.BLOCK == 0 and rows <= formats.MAX_CELL


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= checks.MAX_COUNT
