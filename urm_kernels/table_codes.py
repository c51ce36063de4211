"""Packed tables: low-bit codes of the rows, from which scans get certain bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from . import checks, clusters, table_cells
from .backends import codes as formats
from .backends import cpu, cuda, reference
from .backends.codes import BLOCK, Cells, Codes
from .backends.table_view import gather_rows
from .freshness import MadeFrom
from .progress import Progress, progress_of
from .updates import UpdateLog

Kind = Literal["int2", "int4", "int8"]

KINDS: tuple[tuple[Kind, ...], ...] = (("int4",), ("int8",), ("int4", "int8"), ("int2", "int4"))
CODE_PARTS = ("code_rotation", "code_reference", "code_blocks", "code_fine")
CELL_PARTS = ("code_order", "code_bias", "code_cells", "code_cell_reference", "code_cell_most")
PACKED_PARTS = (*CODE_PARTS, *CELL_PARTS)
_ROWS_AT_ONCE = 1 << 18  # encoded between two steps of the progress bar
# A trial of blocks: rows in all from which it is worth it; and of these, as queries, as rows and as cells.
_FEWEST_TRIED = 1 << 16
_TRIED_QUERIES, _TRIED_ROWS, _TRIED_CELLS = 32, 1 << 16, 1024
_TRIED_RESULTS = 100
_MOST_LEFT = 0.9  # of the cells; as the cpu backend's own sample in every call
_PACKABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class PackableTable(nn.Module):
    """The part of :class:`urm_kernels.ItemTable` that keeps codes."""

    factors: Tensor
    row_scale: Tensor | None
    bias: Tensor | None
    encoded: Tensor | None
    code_rotation: Tensor | None
    code_reference: Tensor | None
    code_blocks: Tensor | None
    code_fine: Tensor | None
    code_order: Tensor | None
    code_bias: Tensor | None
    code_cells: Tensor | None
    code_cell_reference: Tensor | None
    code_cell_most: Tensor | None
    code_cell_rows: int
    code_changed: int  # rows since they were clustered

    _codes_from: MadeFrom | None
    _lock: threading.RLock  # of writers, who may wait for readers while they hold it
    _fetch: threading.RLock  # of readers while they take tensors that belong together, and of who replaces these
    _log: UpdateLog | None
    _check_fresh: Callable[[str], None]  # raises where `encoded` is no longer what the parts add up to

    def pack(
        self,
        codes: Iterable[Kind] = ("int4",),
        *,
        blocks: bool | int = False,
        seed: int = 0,
        progress: Callable[[int, int], object] | None = None,
    ) -> Self:
        """Makes codes of the rows, so that :func:`urm_kernels.score_topk` reads a fraction of the bytes; not one bit of
        its result changes. Returns the table.

        Rows are rotated by three rounds of random signs and Hadamard matrices, and rounded to 2, 4 or 8 bits; beside a
        code its scale is kept, and how much of the row's length it lost. A scan forms integer products of codes, adds
        the most that these can be wrong, and scores exactly only what may still win (docs/design.md has the proof).
        Sources: VA-file (Weber, Schek and Blott, VLDB 1998), RaBitQ (Gao and Long, SIGMOD 2024) for the rotation.

        With ``blocks`` the codes of rows that are alike lie together, in runs of 64 (k-means, by the library's own
        scoring; inside a cluster the longest rows first), and every run has a code of its own that stands for all of
        its rows. A call bounds the runs first and reads only those that may hold one of the best rows; where a sample
        says that they all may, it reads on as without. Rows keep their numbers, and factors stay where they are.

        Codes follow :meth:`update`, :meth:`append` and :meth:`compact`, and are saved with the table. After any other
        edit of the factors (an optimizer's step, say) calls raise until :meth:`refresh`.

        Args:
            codes: ("int4",): r / 2 + 8 bytes a row, for widths that are multiples of 4. ("int8",): r + 8 bytes, fewer
                rows left to score exactly. ("int4", "int8"): both, the 8-bit codes read for what the 4-bit ones leave;
                worth it where many rows are close to the best ones. ("int2", "int4"): r / 4 + 8 bytes a row, for
                widths that are multiples of 8, and r / 2 + 8 that are read for survivors: for ``recall`` below 1. Too
                coarse for exact calls, which scan the rows themselves where 2 bits rule out too little.
            blocks: True: runs of 64 rows, in tables of 65,536 rows or more only where a trial, with some rows as
                queries, says that a tenth of the runs or more will not be read; else codes lie as without (the table's
                ``repr`` says which). Or the rows of a run, a multiple of 32 up to 4096, whatever a trial would say.
                8 bytes a row more, and r / 128 for the codes of runs of 64; with a bias 4 more. Worth it for catalogues
                that cluster. Runs loosen as rows are updated and appended: results stay exact, and
                :class:`urm_kernels.ScanStats` and :meth:`memory` show when packing anew would pay. The ``cuda`` backend
                asks runs in tables of 4 million rows or more.
            seed: of the rotation and the clusters.
            progress: called with (rows done, rows in all), in place of a progress bar, which comes after two seconds on
                a terminal where tqdm is installed. With ``blocks`` a row counts once a pass over it.

        Raises:
            TypeError: float64 factors, which the reference scores.
            ValueError: codes of another kind, blocks of another size, or r above 8192.

        Memory: the codes, and some 100 KiB a thread; with ``blocks`` also 40 bytes a row meanwhile, and a sixteenth of
        the rows as float32.
        """
        kinds = checked_kinds(codes)
        cell_rows = table_cells.rows_of_cells(blocks)
        if cell_rows:
            table_cells.check_rows(len(self.factors))
        seed = checks.count("seed", seed)
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: a function of two integers or None is wanted, {progress!r} came")
        with self._lock:
            self._check_packable()
            self._check_fresh("pack")
            if self._log is not None:
                self._log.flush()
            made = self._new_codes(kinds, cell_rows, blocks is True, seed, progress)
            with self._fetch:
                self._hold_codes(made)
                self.code_changed = 0
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
        cells = None
        if self.code_order is not None:
            assert self.code_cells is not None and self.code_cell_reference is not None
            found = (self.code_order, self.code_bias, self.code_cells, self.code_cell_reference, self.code_cell_most)
            cells = Cells(*found, self.code_cell_rows)
        return Codes(self.code_rotation, self.code_reference, self.code_blocks, self.code_fine, cells)

    def _coded(self) -> tuple[Tensor, Tensor | None]:
        """What codes are made from."""
        return self.factors if self.encoded is None else self.encoded, self.row_scale

    def _code_sources(self) -> tuple[Tensor | None, ...]:
        """What codes are made from, a bias that lies in their order included."""
        return (*self._coded(), None if self.code_bias is None else self.bias)

    def _hold_codes(self, codes: Codes | None) -> None:
        if (before := self.__dict__.get("_codes_from")) is not None:
            before.retire(*self._code_sources())
        cells = None if codes is None else codes.cells
        held = (*(codes[:4] if codes else (None,) * 4), *(cells[:5] if cells else (None,) * 5))
        for name, tensor in zip(PACKED_PARTS, held, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.code_cell_rows = cells.rows if cells else 0
        self._codes_from = None if codes is None else MadeFrom(*self._code_sources())

    def _new_codes(
        self,
        kinds: tuple[str, ...],
        cell_rows: int,
        trial: bool,
        seed: int,
        progress: Callable[[int, int], object] | None,
    ) -> Codes:
        """With cells of so many rows; on trial, only where some of the rows as queries say that they pay."""
        items, row_scale = self._coded()
        rows = len(items) // BLOCK * BLOCK
        with torch.inference_mode(False), torch.no_grad():
            signs = formats.rotation(items.shape[1], seed).to(items.device)
            codes = room_for(signs, len(items), items.shape[1], kinds)
            clustered = clusters.rows_compared(rows) if cell_rows and rows else 0
            with progress_of("pack", rows + clustered, progress) as bar:
                if cell_rows:
                    order = self._clustered(rows, cell_rows, seed, bar)
                    if rows < _FEWEST_TRIED or not trial or self._cells_pay(order, cell_rows, signs, seed):
                        codes = codes._replace(cells=self._cells_of(order, cell_rows))
                return encode(items, row_scale, self.bias, codes, bar)

    def _clustered(self, rows: int, cell_rows: int, seed: int, bar: Progress) -> Tensor:
        """The coded rows by their places."""
        items, row_scale = self._coded()
        if not rows:
            return torch.empty(0, dtype=torch.int64, device=items.device)
        items, row_scale = items[:rows], None if row_scale is None else row_scale[:rows]
        labels = clusters.cluster(items, row_scale, seed=seed, done=bar.more)
        lengths = torch.empty(rows, device=items.device)
        for first in range(0, rows, _ROWS_AT_ONCE):
            part = torch.arange(first, min(first + _ROWS_AT_ONCE, rows), device=items.device)
            lengths[part] = torch.linalg.vector_norm(clusters.rows_of(items, row_scale, part), dim=1)
        return clusters.order_of(labels, lengths, cell_rows)

    def _cells_pay(self, order: Tensor, cell_rows: int, signs: Tensor, seed: int) -> bool:
        """Whether cells of some of the rows would be left out of searches for others."""
        (items, row_scale), r, device = self._coded(), self.factors.shape[1], order.device
        random = torch.Generator().manual_seed(seed)

        def some(rows: Tensor) -> tuple[Tensor, Tensor | None]:
            return clusters.rows_of(items, row_scale, rows), None if self.bias is None else self.bias[rows].float()

        asked = some(order[torch.randint(len(order), (_TRIED_QUERIES,), generator=random).to(device)])[0]
        sampled, bias = some(order[torch.randint(len(order), (_TRIED_ROWS,), generator=random).to(device)])
        scores = asked @ sampled.T
        scores = scores if bias is None else torch.nan_to_num(scores + bias, -torch.inf)
        rank = -(-_TRIED_RESULTS * _TRIED_ROWS // len(order))
        least = scores.topk(min(rank, _TRIED_ROWS)).values[:, -1]
        cells = order[: len(order) // cell_rows * cell_rows].view(-1, cell_rows)
        rows = cells[torch.linspace(0, len(cells) - 1, min(_TRIED_CELLS, len(cells)), device=device).long()].flatten()
        held, bias = some(rows)
        codes = room_for(signs, len(rows), r, ("int4",))
        places = torch.arange(len(rows), device=device)
        codes = codes._replace(cells=table_cells.room_for_cells(places, r, cell_rows, bias is not None))
        codes = encode(held, None, bias, codes, Progress(len(rows), None, None))
        return table_cells.share_left(codes, asked, least) < _MOST_LEFT

    def _cells_of(self, order: Tensor, cell_rows: int) -> Cells:
        return table_cells.room_for_cells(order, self.factors.shape[1], cell_rows, self.bias is not None)

    def _renew_codes(self, order: Tensor | None = None) -> None:
        """Encodes every row again; the rotation stays, and the order of the rows (or the one that is given) where these
        are as many as before."""
        held = self.codes()
        if held is None:
            return
        items, row_scale = self._coded()
        if items.dtype not in _PACKABLE:
            return self._hold_codes(None)
        rows = len(items) // BLOCK * BLOCK
        with torch.inference_mode(False), torch.no_grad():
            signs = held.rotation.float().to(items.device)
            if len(held.blocks) == len(items) // BLOCK and held.blocks.device == items.device and order is None:
                codes = held._replace(rotation=signs, cells=None)
            else:
                codes = room_for(signs, len(items), items.shape[1], _kinds_of(held, items.shape[1]))
            with progress_of("pack", rows, None) as bar:
                if held.cells is not None:
                    if order is None and len(held.cells.order) == rows:
                        order = held.cells.order[:, 0].to(items.device).long()
                    if order is None:
                        order = self._clustered(rows, held.cells.rows, 0, bar)
                    codes = codes._replace(cells=self._cells_of(order, held.cells.rows))
                self._hold_codes(encode(items, row_scale, self.bias, codes, bar))

    def _write_codes(self, rows: Tensor, items: Tensor, row_scale: Tensor | None, bias: Tensor | None) -> None:
        """Of some rows (ascending), whose new contents are given."""
        codes = self.codes()
        if codes is None:
            return
        items = items.detach()
        with torch.no_grad():
            if codes.cells is None:
                return encoder(items).encode_rows(items, row_scale, codes, rows)
            coded = rows < len(codes.cells.order)
            self.code_changed += int(coded.sum())
            places, at = codes.cells.order[rows[coded], 1].long().sort()
            if len(places) and not 0 <= int(places[0]) <= int(places[-1]) < len(codes.cells.order):
                raise RuntimeError("the order of the codes is none of the table's rows (a damaged file?): call pack()")
            at = coded.nonzero().flatten()[at]
            items, row_scale = gather_rows(items, at), None if row_scale is None else row_scale[at]
            encoder(items).encode_rows(items, row_scale, codes, places)
            if codes.cells.bias is not None and bias is not None:
                codes.cells.bias[places] = bias.detach()[at].float()
            table_cells.widen_cells(codes, places, items, row_scale)

    def _codes_of_more(
        self, grown: Codes, items: Tensor, row_scale: Tensor | None, bias: Tensor | None, before: int
    ) -> None:
        """Codes of the blocks that rows from `before` on have completed."""
        first = before // BLOCK
        part = slice(first * BLOCK, len(items) // BLOCK * BLOCK)
        fine = None if grown.fine is None else grown.fine[part]
        scale = None if row_scale is None else row_scale[part]
        cells = grown.cells
        with torch.no_grad():
            more = grown._replace(blocks=grown.blocks[first:], fine=fine, cells=None)
            encoder(items).encode_blocks(items[part], scale, more)
            if cells is None:
                return
            self.code_changed += part.stop - part.start
            cells.order[part] = torch.arange(part.start, part.stop, device=items.device, dtype=torch.int32)[:, None]
            if cells.bias is not None and bias is not None:
                cells.bias[part] = bias[part].float()
            done = part.start // cells.rows
            places = cells.order[done * cells.rows : cells.number() * cells.rows, 0].long()
            scale = None if row_scale is None else row_scale[places]
            table_cells.write_cells(encoder(items), grown, done, gather_rows(items, places), scale)

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


def encode(items: Tensor, row_scale: Tensor | None, bias: Tensor | None, codes: Codes, bar: Progress) -> Codes:
    """Writes the codes of all rows that belong to whole blocks, and those of their cells; returns them with what most
    rows and cells exceed."""
    rows, cells, r = len(codes.blocks) * BLOCK, codes.cells, items.shape[1]
    step = _ROWS_AT_ONCE if cells is None else _ROWS_AT_ONCE // cells.rows * cells.rows
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        some = codes._replace(
            blocks=codes.blocks[part.start // BLOCK : part.stop // BLOCK],
            fine=None if codes.fine is None else codes.fine[part],
            cells=None,
        )
        if cells is None:
            encoder(items).encode_blocks(items[part], None if row_scale is None else row_scale[part], some)
        else:
            order = cells.order[part, 0].long()
            here, scale = gather_rows(items, order), None if row_scale is None else row_scale[order]
            encoder(items).encode_blocks(here, scale, some)
            if cells.bias is not None and bias is not None:
                cells.bias[part] = bias[order].float()
            whole = len(here) // cells.rows * cells.rows
            scale = None if scale is None else scale[:whole]
            table_cells.write_cells(encoder(items), codes, first // cells.rows, here[:whole], scale)
        bar.more(part.stop - part.start)
    codes = codes._replace(reference=formats.references(codes, r))
    return codes if cells is None else codes._replace(cells=cells._replace(reference=table_cells.references(codes, r)))
