"""The search of a packed table: guess a threshold, scan, prove, select; launches only, no wait for the host."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import codes as formats
from ..codes import CELL_BITS, Codes
from ..table_view import ScanOptions, TableView
from .encoding import rotation_words
from .launching import Launcher, Words, address, table_words
from .plan import SCAN_BLOCKS, SELECT_SHARED, SORTED, THREADS, Card, Plan, columns_of_user, make_plan, plan_scan
from .tiles import cells_asked, list_tiles

_COMBINE = {"max": 0, "logsumexp": 0, "sum": 1, "mean": 2}
_SELECT_THREADS = 512
_PASSES, _PASS_BINS = 6, 2048
_CERTAIN = (1.0, 1.0)  # shares of the slack
_WIDEST_BLOCK = 2048  # up to this r a block rotates as many queries as it has warps, else one


class Found(NamedTuple):
    """scores [B, k], ids [B, k]; unproven int64 [1]: how many users needed the second way."""

    scores: Tensor
    ids: Tensor
    unproven: Tensor


class _Call(NamedTuple):
    """One group of users. queries fp32 [B, M, r], exists [B, M]; exclude ascending."""

    queries: Tensor
    exists: Tensor | None
    mask: Tensor | None
    exclude: Tensor | None
    places: int  # queries of a user once they are combined
    log_sum_exp: bool
    combine: int
    shares: tuple[float, float]  # of the certain slack, see slack_shares


def search(
    queries: Tensor,
    table: TableView,
    options: ScanOptions,
    k: int,
    launcher: Launcher,
    card: Card,
    counts: Tensor | None = None,
    proven: Tensor | None = None,
) -> Found:
    """See urm_kernels.score_topk; what it took is added to counts, int64 [5]. proven: bool [B], all True, becomes False
    for users whose result need not be exact."""
    users, rows, device = queries.shape[0], table.items.shape[0], queries.device
    scores = torch.empty((users, k), dtype=torch.float32, device=device)
    ids = torch.empty((users, k), dtype=torch.int64, device=device)
    unproven = torch.zeros(1, dtype=torch.int64, device=device)
    if users == 0 or k == 0:
        return Found(scores, ids, unproven)
    if rows == 0 or queries.shape[1] == 0:
        return Found(scores.fill_(-torch.inf), ids.fill_(-1), unproven)
    places = queries.shape[1] if options.reduce in ("max", "logsumexp") else 1
    cells = cells_asked(table)
    shares = slack_shares(table, options.recall)
    recall = 1.0 if shares == _CERTAIN else options.recall
    plan = make_plan(users, places, rows, table.items.shape[1], k, cells.number() if cells else 0, recall)
    for part, call in _calls(queries, table, options, places, plan.group, shares):
        of_call = None if proven is None or shares == _CERTAIN else proven[part]
        Search(call, table, k, plan, launcher, card, counts, unproven, of_call).run(scores[part], ids[part])
    return Found(scores, ids, unproven)


def slack_shares(table: TableView, recall: float) -> tuple[float, float]:
    """Of tables in blocks all bounds are certain: cells rule out more than less slack does, and which promising rows
    they raise a threshold by is chance."""
    assert table.codes is not None
    in_blocks = table.codes.cells is not None
    return _CERTAIN if in_blocks else formats.slack_shares(recall, table.codes, table.items.shape[1])


def _calls(
    queries: Tensor,
    table: TableView,
    options: ScanOptions,
    places: int,
    group: int,
    shares: tuple[float, float] = _CERTAIN,
) -> Iterator[tuple[slice, _Call]]:
    mask, exclude = options.mask, options.exclude
    if mask is not None and mask.dtype == torch.uint8 and mask.stride(-1) != 1:
        mask = mask.contiguous()
    if exclude is not None:
        exclude = exclude.sort(dim=1).values.contiguous() if exclude.shape[1] else None
    for first in range(0, len(queries), group):
        part = slice(first, first + group)
        exists = None if options.query_mask is None else options.query_mask[part].contiguous()
        own = mask if mask is None or mask.dim() == 1 else mask[part]
        # Of one query it is the dot itself, in the same bits.
        log_sum_exp = options.reduce == "logsumexp" and places > 1
        excluded = None if exclude is None else exclude[part]
        combine = _COMBINE[options.reduce]
        yield (
            part,
            _Call(queries[part].contiguous(), exists, own, excluded, places, log_sum_exp, combine, shares),
        )


class Search:
    """The launches for one group of users."""

    def __init__(
        self,
        call: _Call,
        table: TableView,
        k: int,
        plan: Plan,
        launcher: Launcher,
        card: Card,
        counts: Tensor | None,
        unproven: Tensor,
        proven: Tensor | None = None,
    ) -> None:
        assert table.codes is not None
        self.call, self.table, self.codes, self.k, self.plan = call, table, table.codes, k, plan
        self.cells = None if plan.dense else cells_asked(table)
        self.launcher, self.card, self.unproven, self.proven = launcher, card, unproven, proven
        self.held: list[Tensor] = []  # until the launches that write them are queued
        users, (rows, r) = len(call.queries), table.items.shape
        self.users, self.rows, self.r = users, rows, r
        self.packed, self.rotated = self.floats(2, users, call.places, r).unbind()
        self.largest = self.floats(users, call.places)
        self.existing = self.room(torch.int32, users)
        self.per_user = self.floats(6, users)  # step, kept and lost at most, threshold, limit, inverse
        self.wanted = self.room(torch.int64, users)
        self.keys = self.room(torch.int64, users, plan.capacity)
        self.found = self.room(torch.int32, users)
        self.found_words = (self.keys.data_ptr(), self.found.data_ptr(), plan.capacity, address(counts))
        self.table_words = table_words(table.items, table.bias, table.row_scale)
        self.user_words = (
            self.packed.data_ptr(),
            self.existing.data_ptr(),
            users,
            call.places,
            int(call.log_sum_exp),
        )
        self.filter_words = self._filter()
        step, kept, lost, *limits = (vector.data_ptr() for vector in self.per_user)
        self.limit_words: Words = (*limits, self.wanted.data_ptr())
        self.most_words: Words = (step, kept, lost)

    def run(self, scores: Tensor, ids: Tensor) -> None:
        self._prepare()
        if self.plan.dense:
            self.set_limits(None)
            self._score_rows(0)
        else:
            self.set_limits(self._sample())
            self._scan()
            coded = len(self.codes.blocks) * formats.BLOCK
            if coded < self.rows:
                self._score_rows(coded)
            self._second_way()
        self._select(scores, ids)

    def room(self, dtype: torch.dtype, *shape: int) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=self.call.queries.device)
        self.held.append(made)
        return made

    def floats(self, *shape: int) -> Tensor:
        return self.room(torch.float32, *shape)

    def zeros(self, count: int) -> Tensor:
        made = torch.zeros(count, dtype=torch.int32, device=self.call.queries.device)
        self.held.append(made)
        return made

    def launch(self, name: str, grid: tuple[int, int], threads: int, shared: int, *arguments: Words) -> None:
        self.launcher.launch(f"urm::{name}", grid, threads, shared, list(arguments))

    def _filter(self) -> Words:
        """struct Filter."""
        mask, exclude = self.call.mask, self.call.exclude
        kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
        strides = (0, 0)
        if mask is not None:
            strides = (mask.stride(0) if mask.dim() == 2 else 0, mask.stride(-1))
        excluded = (0, 0) if exclude is None else (exclude.data_ptr(), exclude.shape[1])
        return (address(mask), kind, *strides, address(self.table.alive), *excluded)

    def _prepare(self) -> None:
        call, users, r, codes = self.call, self.users, self.r, self.codes
        self.scan = plan_scan(users, call.places, r)
        _, kept, lost = self.most_words
        exists = address(call.exists)
        threads = THREADS if r <= _WIDEST_BLOCK else 32
        self.launch(
            "prepare_queries", (self.card.blocks(users * call.places), 1), threads, threads // 32 * r * 4,
            (call.queries.data_ptr(),), (exists,), (users,), (call.queries.shape[1],), (call.combine,), (call.places,),
            rotation_words(codes, r), (self.packed.data_ptr(),), (self.rotated.data_ptr(),),
            (self.largest.data_ptr(),), (self.existing.data_ptr(),), (kept,), (lost,), (self.found.data_ptr(),),
        )  # fmt: skip
        bits, fine = formats.bits_of(codes, r), codes.fine is not None
        self.codes_of_queries = self._encoded(bits, fine, codes.reference, call.shares)
        if self.cells is not None:
            self.queries_of_cells = self._encoded(CELL_BITS, False, self.cells.reference, _CERTAIN)

    def _encoded(self, bits: int, fine: bool, reference: Tensor, shares: tuple[float, float]) -> Words:
        """struct QueryCodes, beside codes of so many bits."""
        scan, places, width = self.scan, self.call.places, columns_of_user(self.call.places)
        products = -(-self.users * width // 8)
        fragments = self.room(torch.int32, products, scan.step_pairs, 32, 4)
        starts, row_starts = self.room(torch.int32, 2, products * 8).unbind()
        words = self.room(torch.int32, self.users, formats.quads(self.r), width)
        kept, lost = self.floats(2, products * 8).unbind()
        made = (
            fragments.data_ptr(), starts.data_ptr(), width, scan.step_pairs, words.data_ptr(), row_starts.data_ptr(),
            kept.data_ptr(), lost.data_ptr(), *self.most_words, *map(_bits_of_float, shares),
        )  # fmt: skip
        self.launch(
            "encode_queries", (self.card.blocks(self.users * width), 1), THREADS, 0,
            (self.users,), (places,), (self.r,), (bits,), (int(fine),), (self.rotated.data_ptr(),),
            (self.largest.data_ptr(),), (self.existing.data_ptr(),), (reference.data_ptr(),), made,
        )  # fmt: skip
        return made

    def _sample(self) -> Tensor:
        plan = self.plan
        maxima = self.floats(self.users, plan.slots)
        self.launch(
            "sample_maxima", (self.card.blocks(-(-plan.slots // 8)), 1), THREADS, 0,
            self.table_words, self.user_words, self.filter_words, (plan.step,), (plan.sample,), (plan.slots,),
            (plan.turns,), (maxima.data_ptr(),),
        )  # fmt: skip
        return maxima

    def set_limits(self, maxima: Tensor | None, rank: int | None = None) -> None:
        """From the best maxima of each user; with a rank of their own thresholds that are there only rise."""
        slots = 0 if maxima is None else maxima.shape[1]
        self.launch(
            "set_limits", (self.users, 1), 256, SELECT_SHARED,
            (self.k,), (self.plan.rank if rank is None else rank,), (address(maxima),), (slots,),
            (int(rank is not None),), self.user_words, (self.largest.data_ptr(),), self.codes_of_queries,
            self.limit_words,
        )  # fmt: skip

    def _scan(self) -> None:
        codes, bits = self.codes, formats.bits_of(self.codes, self.r)
        if len(codes.blocks) == 0:
            return
        words = (self.table_words, self.code_words(), self.codes_of_queries)
        self.products(f"scan_codes<{bits}, ", len(codes.blocks), words, list_tiles(self))

    def products(self, kernel: str, blocks: int, words: tuple[Words, Words, Words], more: Words) -> None:
        """Of blocks of codes and all queries. words: the table's, its codes' and the queries'."""
        scan, (table, codes, queries) = self.scan, words
        single = "true" if columns_of_user(self.call.places) == 1 else "false"
        call_words = (
            *table, *self.filter_words, *self.user_words, *codes, *queries, *self.limit_words, *self.found_words,
            _rotation_roundings(self.codes),
        )  # fmt: skip
        grid = (self.card.blocks(-(-blocks // 2), SCAN_BLOCKS), -(-self.users // scan.group_users))
        self.launch(
            f"{kernel}{scan.steps}, {single}>", grid, THREADS, scan.shared, call_words, (scan.group_users,), more
        )

    def code_words(self) -> Words:
        """struct Codes."""
        codes, order, bias = self.codes, None, None
        if codes.cells is not None:
            order, bias = codes.cells.order, codes.cells.bias if self.table.bias is not None else None
        return (
            codes.blocks.data_ptr(), len(codes.blocks), address(codes.fine), codes.reference.data_ptr(),
            address(order), address(bias),
        )  # fmt: skip

    def _score_rows(self, first: int) -> None:
        self.launch(
            "score_rows", (self.card.blocks(-(-(self.rows - first) // 8)), self.users), THREADS, 0,
            self.table_words, self.user_words, self.filter_words, self.limit_words, self.found_words, (first,),
        )  # fmt: skip

    def _second_way(self) -> None:
        left = self.zeros(self.users + 1)
        histograms = self.room(torch.int32, self.users, _PASSES, _PASS_BINS)
        second = (self.unproven.data_ptr(), left.data_ptr(), histograms.data_ptr(), address(self.proven))
        self.launch(
            "begin_second_way", (self.users, 1), 256, 0, (self.users,), self.limit_words, self.found_words, second
        )
        grid = (self.card.blocks(-(-self.rows // 8), 4), 1)
        rows = (self.table_words, self.user_words, self.filter_words, self.limit_words, self.found_words, second)
        for number in range(_PASSES):
            self.launch("count_digits", grid, THREADS, _PASS_BINS * 4, *rows, (number,))
        self.launch("collect_unproven", grid, THREADS, 0, *rows)

    def _select(self, scores: Tensor, ids: Tensor) -> None:
        itself = self.k <= SORTED
        best = None if itself else self.room(torch.int64, self.users, self.k)
        sorted_keys = 1 << max(min(self.k, self.plan.capacity) - 1, 0).bit_length()
        shared = SELECT_SHARED + (8 * sorted_keys if itself else 0)
        self.launch(
            "select_keys", (self.users, 1), _SELECT_THREADS, shared,
            (self.keys.data_ptr(),), (self.found.data_ptr(),), (self.plan.capacity,), (self.k,),
            (scores.data_ptr(),), (ids.data_ptr(),), (address(best),),
        )  # fmt: skip
        if best is not None:
            _unpack(best, scores, ids)


def _bits_of_float(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def _rotation_roundings(codes: Codes) -> int:
    """As rotation_roundings of csrc/common/rotation.h."""
    steps, p = codes.rotation.shape
    return steps * (max(p - 1, 0).bit_length() + 2)


def _unpack(best: Tensor, scores: Tensor, ids: Tensor) -> None:
    """Keys in any order -> results in theirs. With the first bit changed they have the order of signed numbers."""
    signed = (best ^ torch.iinfo(torch.int64).min).sort(dim=1, descending=True).values
    ordered = (signed >> 32).to(torch.int32)
    real = signed != torch.iinfo(torch.int64).min
    score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    scores.copy_(score.where(real, -torch.inf))
    ids.copy_((0xFFFFFFFF - (signed & 0xFFFFFFFF)).where(real, -1))
