"""The bound of the CUDA scan, by what it prunes: a row must survive a threshold that is its own score."""

import torch

from urm_kernels.backends import cuda
from urm_kernels.backends.cuda import launching, plan, search
from urm_kernels.backends.table_view import ScanOptions, TableView

_USERS = 96  # of one scan, each with the threshold of another row
_SCANNED = 600  # pairs of a user and a row in one check


def found_at(queries, table, thresholds, rows, recall=1.0):
    """bool [B], whether a scan finds a row: queries [B, M, r]; thresholds and rows [B], one of each for every user."""
    device, (users, count, _) = queries.device, queries.shape
    view = TableView(table.factors, row_scale=table.row_scale, codes=table.codes())
    sizes = plan.Plan(users, False, rank=1, capacity=max(len(table), 1))
    # Only that row may be found: what else reaches the threshold would be scored for nothing.
    mask = torch.zeros(users, len(table), dtype=torch.bool, device=device)
    mask[torch.arange(users), rows] = True
    shares = search.slack_shares(view, recall)
    ((_, call),) = search._calls(queries, view, ScanOptions(mask=mask), count, users, shares)
    unproven = torch.zeros(1, dtype=torch.int64, device=device)
    one = search.Search(call, view, 1, sizes, launching.launcher(device), cuda.card(device), None, unproven)
    one._prepare()
    one.set_limits(thresholds[:, None].contiguous())
    one._scan()
    assert (one.found <= 1).all()
    return (one.found == 1) & (0xFFFFFFFF - (one.keys[:, 0] & 0xFFFFFFFF) == rows)


def assert_none_is_pruned(queries, table, scores, coded):
    """scores [B, N] canonical. Every row below `coded` is found by its user at its own score, NaN excepted."""
    most = max(_SCANNED // len(scores), 8)  # rows of a user
    for user, of_user in enumerate(scores):
        rows = torch.arange(coded)[~of_user[:coded].isnan()]
        rows = rows[user % 2 :: -(-len(rows) // most) or 1] if len(rows) > most else rows
        for part in rows.split(_USERS) if len(rows) else ():
            asked = queries[user].expand(len(part), *queries.shape[1:]).contiguous()
            found = found_at(asked, table, of_user[part].float(), part)
            assert found.all(), f"user {user}: rows {part[~found][:5].tolist()} are pruned at their own score"
