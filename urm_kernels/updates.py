"""Rows change while others read: every reader sees the table before an update or after it, never between.

Multi-version concurrency control for rows. An update is first put where new readers find it, beside the table (the
*overlay*), and copied into the table once no reader is left that began before it; those who began later read the
overlay's rows and never look at the table's. So readers do not wait for writers, nor writers for readers, and with
nobody reading an update goes straight into the table.

A call finds its log by number, inside the op, so that compiled calls are safe as well. On a GPU the stream puts calls
in order, and no log is needed.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import cpu
from .backends.table_view import Overlay, gather_rows

_keys = itertools.count(1)  # 0 is for tables without a log
_logs: weakref.WeakValueDictionary[int, UpdateLog] = weakref.WeakValueDictionary()


class _Update(NamedTuple):
    version: int
    rows: Tensor  # ascending
    values: dict[str, Tensor]


class UpdateLog:
    """Updates of one set of tensors that share their rows.

    Args:
        tensors: by name, each [N, ...]; written in place.
        items: name of the tensor that scans read as the items; "bias" and "row_scale" are read by these names.
        around: a bound method, entered while tensors are written. Held weakly, as `written` is: a table and its log
            would else keep each other, and a table's memory is too large to wait for the garbage collector.
        written: called within, with the rows (ascending) and their new values, after each update.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        items: str,
        around: Callable[[], AbstractContextManager[None]] | None = None,
        written: Callable[[Tensor, dict[str, Tensor]], None] | None = None,
    ) -> None:
        self.key = next(_keys)
        self.tensors, self.items = tensors, items
        self._around = None if around is None else weakref.WeakMethod(around)
        self._written = None if written is None else weakref.WeakMethod(written)
        self._version = 0
        self._pending: list[_Update] = []
        self._overlay: Overlay | None = None
        self._reset()
        _logs[self.key] = self

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._readers: Counter[int] = Counter()  # by the version that they see
        self._writing = False

    def pin(self) -> tuple[int, Overlay | None]:
        """A reader begins: the version it sees, to be given back by :meth:`unpin`, and what it must read elsewhere."""
        with self._changed:
            self._readers[self._version] += 1
            return self._version, self._overlay

    def unpin(self, version: int) -> None:
        with self._changed:
            self._readers[version] -= 1
            if not self._readers[version]:
                del self._readers[version]
            idle = not self._pending
        if not idle:
            self._settle(once=True)

    def write(self, rows: Tensor, values: dict[str, Tensor]) -> None:
        """Replaces rows (int64 [n], all different, within the table) of the named tensors."""
        if not len(rows):
            return
        rows, order = rows.sort()
        with torch.no_grad(), self._changed:
            # Readers of the overlay find a row there as a whole.
            whole = {n: _rows_of(values[n], order) if n in values else self.current(n, rows) for n in self.tensors}
            self._version += 1
            self._pending.append(_Update(self._version, rows, whole))
            self._overlay = self._merged()
        self._settle()

    def current(self, name: str, rows: Tensor) -> Tensor:
        """The newest values of rows of a tensor."""
        with torch.no_grad(), self._changed:
            values = _rows_of(self.tensors[name], rows)
            for update in self._pending:
                place = torch.searchsorted(update.rows, rows).clamp(max=len(update.rows) - 1)
                same = update.rows[place] == rows
                values = torch.where(
                    same.view(-1, *[1] * (values.dim() - 1)), gather_rows(update.values[name], place), values
                )
            return values

    def flush(self) -> None:
        """Returns when the tensors hold every update: waits for readers that began before the last one."""
        while self._pending:
            self._settle()
            with self._changed:
                self._changed.wait_for(lambda: not self._pending or (not self._writing and bool(self._ready())))

    def extend(self, tensors: dict[str, Tensor]) -> None:
        """The same memory with further rows."""
        with self._changed:
            self.tensors = tensors

    def _settle(self, once: bool = False) -> None:
        """Copies into the tensors what every present reader already reads from the overlay. One thread at a time.

        A reader does this once: what writers add meanwhile is theirs to copy, or the next reader's, or else it would
        work for them for as long as they go on.
        """
        while True:
            with self._changed:
                if self._writing:
                    return
                ready = self._ready()
                if not ready:
                    return
                self._writing = True
            try:
                with self._entered():
                    for update in ready:
                        for name, value in update.values.items():
                            write_rows(self.tensors[name], update.rows, value)
                        if self._written is not None and (written := self._written()) is not None:
                            written(update.rows, update.values)
            finally:
                with self._changed:
                    self._writing = False
                    self._pending = self._pending[len(ready) :]
                    self._overlay = self._merged()
                    self._changed.notify_all()
            if once:
                return

    def _ready(self) -> list[_Update]:
        """Updates that every present reader sees: the first of those pending."""
        oldest = min(self._readers, default=self._version)
        return [update for update in self._pending if update.version <= oldest]

    def _entered(self) -> AbstractContextManager[None]:
        around = None if self._around is None else self._around()
        return nullcontext() if around is None else around()

    def _merged(self) -> Overlay | None:
        """All pending updates as one: the last value of every row that any of them has."""
        if not self._pending:
            return None
        if len(self._pending) == 1:
            _, rows, values = self._pending[0]
            return Overlay(rows, values[self.items], values.get("bias"), values.get("row_scale"))
        rows, order = torch.cat([update.rows for update in self._pending]).sort(stable=True)
        last = torch.ones_like(rows, dtype=torch.bool)
        last[:-1] = rows[1:] != rows[:-1]
        order = order[last]

        def joined(name: str) -> Tensor | None:
            if name not in self.tensors:
                return None
            return _rows_of(torch.cat([update.values[name] for update in self._pending]), order)

        items = joined(self.items)
        assert items is not None
        return Overlay(rows[last], items, joined("bias"), joined("row_scale"))


def find(key: int) -> UpdateLog | None:
    return _logs.get(key)


def _rows_of(source: Tensor, rows: Tensor) -> Tensor:
    """``source[rows]``."""
    return cpu.read_rows(source, rows) if cpu.can_copy_rows(source) else gather_rows(source, rows)


def write_rows(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """``target[rows] = values``, for a leaf that requires gradients as well; autograd learns that it changed."""
    with torch.no_grad():
        if cpu.can_copy_rows(target):
            cpu.write_rows(target, rows, values)
            torch.autograd.graph.increment_version(target)
        else:
            as_bytes = target.dtype == torch.float8_e4m3fn
            whole, part = (t.view(torch.uint8) if as_bytes else t for t in (target, values))
            whole.index_copy_(0, rows, part)


def _after_fork() -> None:
    # Readers of other threads do not exist in the child, and a lock may have been held by one of them.
    for log in list(_logs.values()):
        log._reset()
        log._overlay = log._merged()


os.register_at_fork(after_in_child=_after_fork)
