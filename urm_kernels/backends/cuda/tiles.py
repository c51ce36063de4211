"""Which tiles of codes a scan reads: of cells that may hold one of the best rows, and of rows that may be returned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import codes as formats
from ..codes import Cells
from ..table_view import TableView
from . import plan as plans
from .launching import Words, address
from .plan import SELECT_SHARED, THREADS, plan_cells

if TYPE_CHECKING:
    from .search import Search

ALL: Words = (0, 0, 0)  # struct TileLists of a scan that reads all
_NO_CELLS: Words = (0, 1, 0, 0)
_NO_MASK: Words = (0, 0)
_PROMISE_THREADS = 1024


def cells_asked(table: TableView) -> Cells | None:
    """Those of the table's codes, where they pay: not in small tables, nor with a bias that they do not know."""
    assert table.codes is not None
    cells = table.codes.cells
    if cells is None or not cells.number() or len(table.items) < plans.FEWEST_LISTED:
        return None
    return None if table.bias is not None and cells.most is None else cells


def list_tiles(search: Search) -> Words:
    """struct TileLists, of the tiles that a search has to read once thresholds have been guessed; they rise to what the
    rows of the most promising cells reach."""
    cells, allowed = search.cells, _allowed(search)
    if cells is None and allowed == _NO_MASK:
        return ALL
    cell_words = _NO_CELLS if cells is None else _raise_thresholds(search, cells, allowed)
    groups, tiles = -(-search.users // search.scan.group_users), -(-len(search.codes.blocks) // 2)
    lists = (search.room(torch.int32, groups, tiles).data_ptr(), search.zeros(groups).data_ptr(), tiles)
    search.launch(
        "list_tiles", (search.card.blocks(-(-tiles // 32)), groups), THREADS, 0,
        search.code_words(), cell_words, allowed, search.user_words, search.limit_words, (search.scan.group_users,),
        lists, search.found_words[-1:],
    )  # fmt: skip
    return lists


def _allowed(search: Search) -> Words:
    """struct Allowed: of one mask for all users, whose bytes are few beside those of the codes."""
    mask, alive = search.call.mask, search.table.alive
    shared = mask is None or mask.dim() == 1 or search.users == 1
    if (mask is None and alive is None) or not shared or search.rows < plans.FEWEST_LISTED:
        return _NO_MASK
    blocks = len(search.codes.blocks)
    tiles = search.zeros(-(-blocks // 64))
    words = (tiles.data_ptr(), search.zeros(1).data_ptr())
    search.launch(
        "mark_allowed", (search.card.blocks(blocks), 1), THREADS, 16, search.filter_words, search.code_words(), words
    )
    return words


def _raise_thresholds(search: Search, cells: Cells, allowed: Words) -> Words:
    """struct Cells, with their bounds."""
    count, users = cells.number(), search.users
    sizes = plan_cells(users, search.call.places, search.k, count, cells.rows)
    bounds, promise = search.floats(users, count), search.floats(users)
    most = cells.most if search.table.bias is not None else None
    cell_words = (count, cells.rows // formats.BLOCK, address(most), bounds.data_ptr())
    table = (0, 0, count, search.r, *[0] * 8)  # its rows and their width
    codes = (cells.blocks.data_ptr(), len(cells.blocks), 0, cells.reference.data_ptr(), 0, 0)
    words = (table, codes, search.queries_of_cells)
    search.products("bound_cells<", len(cells.blocks), words, (bounds.data_ptr(),))
    search.launch(
        "set_promise", (users, 1), _PROMISE_THREADS, SELECT_SHARED + 4 * sizes.sample,
        cell_words, allowed, search.user_words, search.limit_words, (sizes.step,), (sizes.sample,), (sizes.rank,),
        (promise.data_ptr(),),
    )  # fmt: skip
    room = search.plan.capacity  # for twice the rows that a guess lets through
    scores = search.floats(users, room).fill_(-torch.inf)
    search.launch(
        "score_promising", (search.card.blocks(-(-count // 32)), users), THREADS, 0,
        search.table_words, search.user_words, search.filter_words, search.code_words(), cell_words, allowed,
        search.limit_words, (promise.data_ptr(),), (sizes.promising,), (search.zeros(2 * users).data_ptr(),),
        (scores.data_ptr(),), (room,),
    )  # fmt: skip
    search.set_limits(scores, search.k)
    return cell_words
