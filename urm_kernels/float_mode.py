"""The floating-point mode of torch's own operations, for regions that promise bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def default_float_mode(device: torch.device) -> Iterator[None]:
    """Denormals are numbers in here and autocast is off, whatever mode the caller's thread is in.

    The mode belongs to a thread and torch's workers inherit it when they start, so where it is found on, the region
    also stays on one thread.
    """
    with torch.autocast(device.type, enabled=False) if _autocasts(device.type) else contextlib.nullcontext():
        if device.type != "cpu" or _SMALLEST * 1.0 > 0.0:
            yield
        else:
            with _denormals():
                yield


_SMALLEST = 5e-324


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextlib.contextmanager
def _denormals() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        torch.set_flush_denormal(True)
