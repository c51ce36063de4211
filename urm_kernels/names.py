"""The caller's own names of rows: whole numbers or strings, and the way from them back to rows.

Strings are kept as one tensor of UTF-8 bytes and one of offsets, so that tens of millions of them are two tensors, not
tens of millions of objects. Both kinds are found through sorted 64-bit keys (a string's is a hash of it, and what it
finds is compared byte by byte); names that came by ``append`` wait in a dict until they are worth sorting in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backends.table_view import rows_of_bits
from .interop import as_tensor

_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd: its powers are a permutation of each character's weight
_HASHED_AT_ONCE = 1 << 22  # bytes


def as_names(argument: str, names: Any) -> Any:
    """Arrays of numbers as tensors; strings as they are."""
    if isinstance(names, np.ndarray) and names.dtype.kind not in "iufb":
        return names
    return as_tensor(argument, names)


class Names:
    """Names of rows [0, N): ``ids`` [N] int64, or ``text`` bytes uint8 with ``offsets`` int64 [N + 1].

    Reading is safe while another thread appends.
    """

    def __init__(self, ids: Tensor | None, text: Tensor | None = None, offsets: Tensor | None = None) -> None:
        self.ids, self.text, self.offsets = ids, text, offsets
        self._index: _Index | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, names: Any, rows: int) -> Names:
        """From what a caller gives: an int64 tensor, or a sequence of strings; all different.

        Raises TypeError or ValueError in words.
        """
        if isinstance(names, Tensor):
            if names.dtype != torch.int64:
                raise TypeError(f"ids: an int64 tensor or a sequence of strings is wanted, {names.dtype} came")
            made = cls(names)
            shape = list(names.shape)
        else:
            made = cls(None, *_encoded(names))
            shape = [len(made)]
        if shape != [rows]:
            raise ValueError(f"ids: one for each of {rows} rows is wanted, shape {shape} came")
        made.index(None)
        return made

    def unlock(self) -> None:
        """In a forked child: whoever held the lock is not there."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        if self.ids is not None:
            return len(self.ids)
        assert self.offsets is not None
        return len(self.offsets) - 1

    @property
    def are_strings(self) -> bool:
        return self.ids is None

    def index(self, alive: Tensor | None) -> _Index:
        """The sorted names of rows that have not been removed, made when first asked for."""
        with self._lock:
            if self._index is None:
                self._index = _Index(self, alive)
            return self._index

    def joined(self, more: Names, alive: Tensor | None, join: Callable[[str, Tensor], Tensor]) -> Names:
        """These names and then those of further rows, none of which may be that of a row that is still there.

        `alive` are the bits of both; `join` puts more behind one of the table's tensors of names.
        """
        if more.are_strings != self.are_strings:
            wanted, came = ("strings", "int64") if self.are_strings else ("int64", "strings")
            raise TypeError(f"ids: {wanted} are wanted, as the table has, {came} came")
        index = self.index(alive)
        found = index.find(more, alive)
        if (found >= 0).any():
            at = int((found >= 0).nonzero()[0])
            raise ValueError(f"ids: new names are wanted, {more.name(at)!r} is that of row {int(found[at])}")
        first = len(self)
        if self.ids is not None:
            assert more.ids is not None
            joined = Names(join("ids", more.ids))
        else:
            assert self.text is not None and self.offsets is not None and more.text is not None
            assert more.offsets is not None
            behind = more.offsets[1:].to(self.offsets.device) + self.offsets[-1]
            joined = Names(None, join("id_text", more.text), join("id_offsets", behind))
        joined._index = index.with_recent({more.name(i): first + i for i in range(len(more))}, joined, alive)
        return joined

    def kept(self, rows: Tensor) -> Names:
        """Names of some of the rows, in their order."""
        if self.ids is not None:
            return Names(self.ids[rows])
        assert self.text is not None and self.offsets is not None
        _check_offsets(self.text, self.offsets)
        lengths = self.offsets.diff()[rows]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        # Byte j of the result comes from as far behind its string's old start as it is behind the new one.
        shift = (self.offsets[:-1][rows] - offsets[:-1]).repeat_interleave(lengths)
        return Names(None, self.text[torch.arange(len(shift), device=shift.device) + shift], offsets)

    def with_tensors(self, ids: Tensor | None, text: Tensor | None, offsets: Tensor | None) -> Names:
        """The same names on another device."""
        return Names(ids, text, offsets)

    def index_bytes(self) -> int:
        """Bytes of the sorted keys, 0 until they are made."""
        index = self._index
        return 0 if index is None else index.sorted.nbytes + index.order.nbytes

    def name(self, row: int) -> int | str:
        """Raises ValueError where a damaged table's offsets or bytes make no string."""
        if self.ids is not None:
            return int(self.ids[row])
        return self._bytes(row).decode("utf-8")

    def _bytes(self, row: int) -> bytes:
        assert self.text is not None and self.offsets is not None
        start, end = (int(o) for o in self.offsets[row : row + 2])
        if not 0 <= start <= end <= len(self.text):
            raise ValueError(f"ids: offsets {start} to {end} of row {row} are not within {len(self.text)} bytes")
        return self.text[start:end].numpy(force=True).tobytes()

    def names(self, rows: Tensor) -> Any:
        """Names in the shape of ``rows``: int64 tensor with -1, or NumPy array of str with None, where rows are -1."""
        if self.ids is not None:
            if not len(self.ids):
                return torch.full_like(rows, -1)
            return self.ids[rows.clamp(min=0)].masked_fill(rows < 0, -1)
        out = np.empty(tuple(rows.shape), dtype=object)
        out.reshape(-1)[:] = [None if row < 0 else self.name(row) for row in rows.flatten().tolist()]
        return out

    def rows(self, names: Any, alive: Tensor | None) -> Tensor:
        """Rows of names, in their shape.

        Raises ValueError in words where one is not there, TypeError for other kinds.
        """
        if self.ids is not None:
            if not isinstance(names, Tensor) or names.dtype != torch.int64:
                came = names.dtype if isinstance(names, Tensor) else type(names).__name__
                raise TypeError(f"external: an int64 tensor is wanted, {came} came")
            shape, asked = names.shape, Names(names.flatten())
        else:
            array = np.asarray(names, dtype=object)
            shape = torch.Size(array.shape)
            asked = Names(None, *_encoded(array.reshape(-1).tolist(), "external"))
        found = self.index(alive).find(asked, alive)
        if (found < 0).any():
            missing = asked.name(int((found < 0).nonzero()[0]))
            raise ValueError(f"external: id {missing!r} is not in the table")
        return found.view(shape)

    def keys(self) -> Tensor:
        """[N] int64: the numbers, or hashes of the strings."""
        return self.ids if self.ids is not None else _hashes(self.text, self.offsets)


class _Index:
    """Sorted keys of the first rows, and a dict of the names that came after."""

    def __init__(self, names: Names, alive: Tensor | None, recent: dict[int | str, int] | None = None) -> None:
        self.names = names
        self.recent = recent or {}
        keys = names.keys()
        rows = torch.arange(len(names), device=keys.device)
        if alive is not None:
            rows = rows[rows_of_bits(alive, rows)]
        self.sorted, order = keys[rows].sort(stable=True)
        self.order = rows[order]
        self._refuse_repeated()

    def with_recent(self, recent: dict[int | str, int], names: Names, alive: Tensor | None) -> _Index:
        """The index of more names, which come after these."""
        if len(self.recent) + len(recent) > 1024 + len(self.sorted) // 16:
            return _Index(names, alive)
        # The dict is shared by all indexes of one sorting: each passes over rows that it does not have.
        self.recent.update(recent)
        index = object.__new__(_Index)
        index.names, index.recent, index.sorted, index.order = names, self.recent, self.sorted, self.order
        return index

    def find(self, asked: Names, alive: Tensor | None) -> Tensor:
        """Row of every name, -1 where it is not there or has been removed."""
        keys = asked.keys().contiguous()
        if len(self.sorted):
            place = torch.searchsorted(self.sorted, keys).clamp(max=len(self.sorted) - 1)
            found = self.order[place].where(self.sorted[place] == keys, -1)
        else:
            place = found = torch.full_like(keys, -1)
        if self.names.are_strings:
            for i in (found >= 0).nonzero().flatten().tolist():
                found[i] = self._same_string(asked, i, int(place[i]))
        if alive is not None and len(alive):
            there = rows_of_bits(alive, found.clamp(min=0))
            found = found.where(there, -1)
        if self.recent:
            for i in (found < 0).nonzero().flatten().tolist():
                row = self.recent.get(asked.name(i), -1)
                if 0 <= row < len(self.names) and (alive is None or (int(alive[row >> 3]) >> (row & 7)) & 1):
                    found[i] = row
        return found

    def _same_string(self, asked: Names, i: int, place: int) -> int:
        wanted, key = asked._bytes(i), self.sorted[place]
        for at in range(place, len(self.sorted)):
            if self.sorted[at] != key:
                break
            row = int(self.order[at])
            if self.names._bytes(row) == wanted:
                return row
        return -1

    def _refuse_repeated(self) -> None:
        for at in (self.sorted[1:] == self.sorted[:-1]).nonzero().flatten().tolist():
            # Strings of one hash: almost always the same string, compared with all before it that share the hash.
            for before in range(at, -1, -1):
                if self.sorted[before] != self.sorted[at]:
                    break
                first, second = int(self.order[before]), int(self.order[at + 1])
                if not self.names.are_strings or self.names._bytes(first) == self.names._bytes(second):
                    name = self.names.name(first)
                    raise ValueError(f"ids: all different is wanted, {name!r} came twice (rows {first} and {second})")


def _encoded(names: Any, argument: str = "ids") -> tuple[Tensor, Tensor]:
    """(UTF-8 bytes of all strings, offsets [n + 1])."""
    if isinstance(names, (str, bytes)) or not isinstance(names, (Sequence, np.ndarray)):
        raise TypeError(f"{argument}: an int64 tensor or a sequence of strings is wanted, {type(names).__name__} came")
    parts = []
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: strings are wanted, {name!r} of type {type(name).__name__} came")
        try:
            parts.append(name.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise ValueError(f"{argument}: strings of valid Unicode are wanted, {name!r} came: {error}") from error
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    text = np.frombuffer(b"".join(parts), dtype=np.uint8).copy()
    return torch.from_numpy(text), torch.from_numpy(offsets)


def _check_offsets(text: Tensor, offsets: Tensor) -> None:
    ascend = offsets[0] == 0 and offsets[-1] == len(text) and (offsets[1:] >= offsets[:-1]).all()
    if not ascend:
        raise ValueError("ids: offsets that ascend from 0 to the number of bytes are wanted; the table is damaged")


def _hashes(text: Tensor | None, offsets: Tensor | None) -> Tensor:
    """[n] int64: sum of (byte + 1) times a power of an odd constant by its place, mixed; some strings at a time."""
    assert text is not None and offsets is not None
    _check_offsets(text, offsets)
    data, ends = text.numpy(force=True), offsets.numpy(force=True)
    out = np.zeros(max(len(ends) - 1, 0), dtype=np.uint64)
    first = 0
    while first < len(out):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + _HASHED_AT_ONCE, side="right")) - 1)
        last = min(last, len(out))
        start, lengths = ends[first], np.diff(ends[first : last + 1])
        piece = data[start : ends[last]].astype(np.uint64) + np.uint64(1)
        places = np.arange(len(piece), dtype=np.int64) - np.repeat(ends[first:last] - start, lengths)
        powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _PRIME, dtype=np.uint64))
        piece *= powers[places]
        totals = np.concatenate([np.zeros(1, np.uint64), np.cumsum(piece, dtype=np.uint64)])
        out[first:last] = totals[ends[first + 1 : last + 1] - start] - totals[ends[first:last] - start]
        first = last
    out ^= out >> np.uint64(32)
    out *= np.uint64(0xD6E8FEB86659FD93)
    out ^= out >> np.uint64(32)
    return torch.from_numpy(out.view(np.int64)).to(offsets.device)
