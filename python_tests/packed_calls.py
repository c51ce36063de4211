"""Calls of score_topk as the CUDA backend answers them: every table is packed first, by the device's own encoder.

On a CUDA device these are the real kernels, on the CPU their stand-in (simt/). The contract's tests thereby run on the
kernels of packed tables as on every other machine.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import simt
import torch

from urm_kernels import clusters, table_codes
from urm_kernels.backends import codes as formats
from urm_kernels.backends import cuda, select
from urm_kernels.backends.cuda import launching, plan, search
from urm_kernels.table_cells import room_for_cells
from urm_kernels.table_codes import _PACKABLE, room_for

CPU = torch.device("cpu")


def why_not(device):
    """Why no such call can be made on a device, or None."""
    return cuda.why_not(device, ()) if device.type == "cuda" else simt.why_not()


@contextlib.contextmanager
def stand_in(device=CPU):
    """Within, the CUDA backend takes CPU tensors; nothing changes on a CUDA device."""
    if device.type == "cuda":
        yield
        return
    launching.install_stand_in(simt.launcher())
    try:
        yield
    finally:
        launching.install_stand_in(None)


@contextlib.contextmanager
def packed_calls(kinds, device, cell_rows=0):
    """Within, the table of every call of score_topk is packed, and scanned however small it is; in cells of so many
    rows, if any. Without kinds only tables that are packed already are the CUDA backend's."""
    choose = select.choose

    def chosen(function, queries, table, requested, *, counts=False):
        takes = _takes(table) and (kinds or table.codes is not None)
        if function != "score_topk" or not takes or cuda.why_not(table.items.device, table.dtypes()):
            return choose(function, queries, table, requested, counts=counts)
        if not kinds:
            return cuda
        return SimpleNamespace(
            score_topk=lambda q, t, options, *rest: cuda.score_topk(q, packed(t, kinds, cell_rows), options, *rest)
        )

    small = {"DENSE_ROWS": 40, "FEWEST_SAMPLED": 128, "MOST_SAMPLED": 1024, "FEWEST_LISTED": 40, "SAMPLED_CELLS": 64}
    poisoned = mock.patch.object(search.Search, "room", _poisoned)
    with stand_in(device), mock.patch.object(select, "choose", chosen), mock.patch.multiple(plan, **small), poisoned:
        yield


_room = search.Search.room


def _poisoned(self, dtype, *shape):
    """A workspace whose bytes are NaN as floats, and no index as integers, until a kernel has written them."""
    made = _room(self, dtype, *shape)
    made.view(torch.uint8).fill_(0xFF)
    return made


def _takes(table):
    width = table.items.shape[1]
    return table.overlay is None and table.items.dtype in _PACKABLE and 1 <= width <= formats.MAX_WIDTH


def packed(table, kinds, cell_rows=0, seed=0):
    """The view with codes, which the device has made; in cells of so many rows that are
    alike: of one kind are those that one of a few rows is nearest to."""
    items, (rows, r) = table.items.detach(), table.items.shape
    codes = room_for(formats.rotation(r, seed).to(items.device), rows, r, kinds)
    coded = rows // formats.BLOCK * formats.BLOCK
    if cell_rows and coded:
        some = items[:coded].float().nan_to_num()
        kinds_of_rows = torch.cdist(some, some[:: -(-coded // 16)]).argmin(1).int()
        order = clusters.order_of(kinds_of_rows, some.norm(dim=1), cell_rows)
        codes = codes._replace(cells=room_for_cells(order, r, cell_rows, table.bias is not None))
    with mock.patch.object(table_codes, "encoder", return_value=cuda):
        codes = table_codes.encode(items, table.row_scale, table.bias, codes, SimpleNamespace(more=lambda rows: None))
    return table._replace(codes=codes)
