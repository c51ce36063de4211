"""Progress of what takes long: a bar after two seconds, on a terminal, where tqdm is installed; or the caller's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class Progress:
    """Of so many rows in all; `report` is called with (rows done, rows in all) in place of a bar."""

    def __init__(self, total: int, report: Callable[[int, int], object] | None, bar: Any) -> None:
        self._done, self._total, self._report, self._bar = 0, total, report, bar

    def more(self, rows: int) -> None:
        self._done += rows
        if self._report is not None:
            self._report(self._done, self._total)
        if self._bar is not None:
            self._bar.update(rows)


@contextlib.contextmanager
def progress_of(
    what: str, rows: int, report: Callable[[int, int], object] | None, unit: str = "row"
) -> Iterator[Progress]:
    bar = None
    if report is None:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=rows, desc=what, unit=unit, unit_scale=True, delay=2, leave=False, disable=None)
    try:
        yield Progress(rows, report, bar)
    finally:
        if bar is not None:
            bar.close()
