"""Packed tables: low-bit codes of the rows, from which scans get certain bounds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from . import checks
from .backends import codes as formats
from .backends import cpu, cuda, reference
from .backends.codes import BLOCK, Codes
from .freshness import MadeFrom
from .updates import UpdateLog

Kind = Literal["int2", "int4", "int8"]

KINDS: tuple[tuple[Kind, ...], ...] = (("int4",), ("int8",), ("int4", "int8"), ("int2", "int4"))
CODE_PARTS = ("code_rotation", "code_reference", "code_blocks", "code_fine")
_ROWS_AT_ONCE = 1 << 18  # encoded between two steps of the progress bar
_PACKABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class PackableTable(nn.Module):
    """The part of :class:`urm_kernels.ItemTable` that keeps codes."""

    factors: Tensor
    row_scale: Tensor | None
    encoded: Tensor | None
    code_rotation: Tensor | None
    code_reference: Tensor | None
    code_blocks: Tensor | None
    code_fine: Tensor | None

    _codes_from: MadeFrom | None
    _lock: threading.RLock  # of writers, who may wait for readers while they hold it
    _fetch: threading.RLock  # of readers while they take tensors that belong together, and of who replaces these
    _log: UpdateLog | None
    _check_fresh: Callable[[str], None]  # raises where `encoded` is no longer what the parts add up to

    def pack(
        self,
        codes: Iterable[Kind] = ("int4",),
        *,
        seed: int = 0,
        progress: Callable[[int, int], object] | None = None,
    ) -> Self:
        """Makes codes of the rows, so that :func:`urm_kernels.score_topk` reads a fraction of the bytes; not one bit of
        its result changes. Returns the table.

        Rows are rotated by three rounds of random signs and Hadamard matrices, and rounded to 2, 4 or 8 bits; beside a
        code its scale is kept, and how much of the row's length it lost. A scan forms integer products of codes, adds
        the most that these can be wrong, and scores exactly only what may still win (docs/design.md has the proof).
        Sources: VA-file (Weber, Schek and Blott, VLDB 1998), RaBitQ (Gao and Long, SIGMOD 2024) for the rotation.

        Codes follow :meth:`update`, :meth:`append` and :meth:`compact`, and are saved with the table. After any other
        edit of the factors (an optimizer's step, say) calls raise until :meth:`refresh`.

        Args:
            codes: ("int4",): r / 2 + 8 bytes a row, for widths that are multiples of 4. ("int8",): r + 8 bytes, fewer
                rows left to score exactly. ("int4", "int8"): both, the 8-bit codes read for what the 4-bit ones leave;
                worth it where many rows are close to the best ones. ("int2", "int4"): r / 4 + 8 bytes a row, for
                widths that are multiples of 8, and r / 2 + 8 that are read for survivors: for ``recall`` below 1. Too
                coarse for exact calls, which scan the rows themselves where 2 bits rule out too little.
            seed: of the rotation.
            progress: called with (rows done, rows in all), in place of a progress bar, which comes after two seconds on
                a terminal where tqdm is installed.

        Raises:
            TypeError: float64 factors, which the reference scores.
            ValueError: codes of another kind, or r above 8192.

        Memory: the codes, and some 100 KiB a thread.
        """
        kinds = checked_kinds(codes)
        seed = checks.count("seed", seed)
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: a function of two integers or None is wanted, {progress!r} came")
        with self._lock:
            self._check_packable()
            self._check_fresh("pack")
            if self._log is not None:
                self._log.flush()
            made = self._new_codes(kinds, seed, progress)
            with self._fetch:
                self._hold_codes(made)
        return self

    def unpack(self) -> Self:
        """Drops the codes. Returns the table."""
        with self._lock, self._fetch:
            self._hold_codes(None)
        return self

    @property
    def is_packed(self) -> bool:
        """Whether the table has codes."""
        return self.code_blocks is not None

    def codes(self) -> Codes | None:
        """The codes as tensors, or None."""
        if self.code_blocks is None:
            return None
        assert self.code_rotation is not None and self.code_reference is not None
        return Codes(self.code_rotation, self.code_reference, self.code_blocks, self.code_fine)

    def _coded(self) -> tuple[Tensor, Tensor | None]:
        """What codes are made from."""
        return self.factors if self.encoded is None else self.encoded, self.row_scale

    def _hold_codes(self, codes: Codes | None) -> None:
        if (before := self.__dict__.get("_codes_from")) is not None:
            before.retire(*self._coded())
        for name, tensor in zip(CODE_PARTS, codes or (None,) * 4, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self._codes_from = None if codes is None else MadeFrom(*self._coded())

    def _new_codes(self, kinds: tuple[str, ...], seed: int, progress: Callable[[int, int], object] | None) -> Codes:
        items, row_scale = self._coded()
        with torch.inference_mode(False), torch.no_grad():
            signs = formats.rotation(items.shape[1], seed).to(items.device)
            return encode(items, row_scale, room_for(signs, len(items), items.shape[1], kinds), progress)

    def _renew_codes(self) -> None:
        """Encodes every row again; the rotation stays."""
        held = self.codes()
        if held is None:
            return
        items, row_scale = self._coded()
        if items.dtype not in _PACKABLE:
            return self._hold_codes(None)
        with torch.inference_mode(False), torch.no_grad():
            signs = held.rotation.float().to(items.device)
            if len(held.blocks) == len(items) // BLOCK and held.blocks.device == items.device:
                codes = held._replace(rotation=signs)
            else:
                codes = room_for(signs, len(items), items.shape[1], _kinds_of(held, items.shape[1]))
            self._hold_codes(encode(items, row_scale, codes, None))

    def _write_codes(self, rows: Tensor, items: Tensor, row_scale: Tensor | None) -> None:
        """Of some rows (ascending), whose new contents are given."""
        codes = self.codes()
        if codes is not None:
            with torch.no_grad():
                encoder(items).encode_rows(items.detach(), row_scale, codes, rows)

    def _codes_of_more(self, grown: Codes, items: Tensor, row_scale: Tensor | None, before: int) -> None:
        """Codes of the blocks that rows from `before` on have completed."""
        first = before // BLOCK
        part = slice(first * BLOCK, len(items) // BLOCK * BLOCK)
        fine = None if grown.fine is None else grown.fine[part]
        scale = None if row_scale is None else row_scale[part]
        with torch.no_grad():
            more = grown._replace(blocks=grown.blocks[first:], fine=fine)
            encoder(items).encode_blocks(items[part], scale, more)

    def _check_packable(self) -> None:
        dtype, width = self.factors.dtype, self.factors.shape[1]
        if dtype not in _PACKABLE:
            raise TypeError(f"pack: {dtype} factors are scored by the reference alone, without codes; convert them")
        if not 1 <= width <= formats.MAX_WIDTH:
            raise ValueError(f"pack: factors of width r from 1 to {formats.MAX_WIDTH} have codes, r = {width} came")


def _kinds_of(codes: Codes, r: int) -> tuple[str, ...]:
    bits = formats.bits_of(codes, r)
    return (f"int{bits}",) + (() if codes.fine is None else (f"int{formats.fine_bits(bits)}",))


def room_for(signs: Tensor, rows: int, r: int, kinds: tuple[str, ...]) -> Codes:
    """Codes that have not been written."""
    blocks, device = rows // BLOCK, signs.device

    def room(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=torch.uint8, device=device)
        if encoder(made) is cpu:
            cpu.ask_for_large_pages(made)
        return made

    fine = room(blocks * BLOCK, formats.fine_bytes(r, int(kinds[1][3:]))) if len(kinds) == 2 else None
    return Codes(signs, torch.zeros(2, device=device), room(blocks, formats.block_bytes(r, int(kinds[0][3:]))), fine)


def checked_kinds(codes: Any) -> tuple[Kind, ...]:
    if isinstance(codes, str) or not isinstance(codes, Iterable) or tuple(codes) not in KINDS:
        raise ValueError(f"codes: one of {', '.join(map(str, KINDS))} is wanted, {codes!r} came")
    return tuple(codes)


def encoder(items: Tensor) -> Any:
    """The backend that makes codes of these rows."""
    for backend in (cpu, cuda):
        if backend.why_not(items.device, (items.dtype,)) is None:
            return backend
    return reference


def encode(
    items: Tensor, row_scale: Tensor | None, codes: Codes, progress: Callable[[int, int], object] | None
) -> Codes:
    """Writes the codes of all rows that belong to whole blocks; returns them with what most rows exceed.

    A progress bar comes after two seconds, on a terminal, where tqdm is installed, unless ``progress`` is given.
    """
    rows = len(codes.blocks) * BLOCK
    bar = None
    if progress is None:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=rows, desc="pack", unit="row", unit_scale=True, delay=2, leave=False, disable=None)
    try:
        for first in range(0, rows, _ROWS_AT_ONCE):
            part = slice(first, min(first + _ROWS_AT_ONCE, rows))
            some = codes._replace(
                blocks=codes.blocks[part.start // BLOCK : part.stop // BLOCK],
                fine=None if codes.fine is None else codes.fine[part],
            )
            encoder(items).encode_blocks(items[part], None if row_scale is None else row_scale[part], some)
            if progress is not None:
                progress(part.stop, rows)
            if bar is not None:
                bar.update(part.stop - part.start)
    finally:
        if bar is not None:
            bar.close()
    return codes._replace(reference=formats.references(codes, items.shape[1]))
