"""Whether tensors are still what something was made from: torch counts a tensor's edits, and this remembers the count.

A table's own updates edit the tensors and what was made from them together; meanwhile readers, who never wait, are told
what was true before. An op finds the object by its number, so that compiled calls are checked as well.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

_keys = itertools.count(1)  # 0 is for what was made from nothing
_all: weakref.WeakValueDictionary[int, MadeFrom] = weakref.WeakValueDictionary()


def _versions(tensors: Iterable[Tensor | None]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None]


class MadeFrom:
    """Remembers tensors as they are now."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.key = next(_keys)
        self._lock = threading.Lock()
        self._settled: bool | None = None  # what readers are told while a write goes on, and ever after a successor
        self._writers, self._succeeded = 0, False
        self._remembered = _versions(tensors)
        _all[self.key] = self

    def fresh(self, *tensors: Tensor | None) -> bool:
        """Whether these are the tensors, unedited but for own writes."""
        with self._lock:
            if self._settled is not None:
                return self._settled
            return _versions(tensors) == self._remembered

    @contextmanager
    def own_write(self, *tensors: Tensor | None) -> Iterator[None]:
        """Around edits of the tensors that are made to what was made from them, too. Several may go on at once."""
        with self._lock:
            if not self._writers and not self._succeeded:
                self._settled = self._remembered == _versions(tensors)
            self._writers += 1
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                if not self._writers and not self._succeeded:
                    if self._settled:
                        self._remembered = _versions(tensors)
                    self._settled = None

    def retire(self, *tensors: Tensor | None) -> None:
        """Something else will be made from now on. Readers that have found this one are told what is true now."""
        with self._lock:
            if self._settled is None:
                self._settled = self._remembered == _versions(tensors)
            self._succeeded = True

    def successor(self, *tensors: Tensor | None) -> MadeFrom:
        """During an own write: for readers to come, of other memory. Those that began before keep this one."""
        after = MadeFrom(*tensors)
        self.retire(*tensors)
        if not self._settled:
            after._remembered = []
        return after

    def unlock(self) -> None:
        """In a forked child, which does not have the thread that may have held the lock."""
        self._lock = threading.Lock()
        self._writers = 0
        if not self._succeeded:
            self._settled = None


def find(key: int) -> MadeFrom | None:
    return _all.get(key)


def _after_fork() -> None:
    for made_from in list(_all.values()):
        made_from.unlock()


os.register_at_fork(after_in_child=_after_fork)
