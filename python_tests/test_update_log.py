"""The log of a table's updates by itself: who sees what, and when the tensors hold it."""

import threading

import torch

from urm_kernels import ItemTable, score_topk
from urm_kernels.backends.table_view import Overlay, TableView
from urm_kernels.updates import UpdateLog


def log_of(rows=8):
    tensors = {"factors": torch.zeros(rows, 2), "bias": torch.zeros(rows)}
    return tensors, UpdateLog(tensors, "factors")


def values_of(version, rows):
    return {"factors": torch.full((rows, 2), float(version)), "bias": torch.full((rows,), float(version))}


def test_a_reader_that_began_before_delays_the_write_until_it_ends():
    tensors, log = log_of()
    before, overlay = log.pin()
    assert overlay is None
    log.write(torch.tensor([5, 2]), values_of(1, 2))
    assert not tensors["factors"].any() and not tensors["bias"].any()
    after, overlay = log.pin()
    assert after > before and overlay.rows.tolist() == [2, 5] and overlay.items.tolist() == [[1, 1], [1, 1]]
    assert log.current("bias", torch.tensor([2, 3])).tolist() == [1, 0]
    log.write(torch.tensor([2]), {"bias": torch.tensor([9.0])})
    newest, overlay = log.pin()
    assert (
        overlay.rows.tolist() == [2, 5] and overlay.bias.tolist() == [9, 1] and overlay.items.tolist() == [[1, 1]] * 2
    )
    log.unpin(before)  # the second update waits for the reader of the first
    assert tensors["bias"].tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    log.unpin(newest)
    assert tensors["bias"].tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    log.unpin(after)
    assert tensors["bias"].tolist() == [0, 0, 9, 0, 0, 1, 0, 0] and log.pin()[1] is None


def test_with_nobody_reading_an_update_goes_straight_into_the_table():
    tensors, log = log_of()
    log.write(torch.tensor([1]), values_of(3, 1))
    assert tensors["bias"].tolist() == [0, 3, 0, 0, 0, 0, 0, 0] and log.pin() == (1, None)


def test_a_reader_does_not_work_for_writers_for_as_long_as_they_go_on():
    tensors = {"factors": torch.zeros(8, 2), "bias": torch.zeros(8)}

    class Table:
        written_rows = 0

        def written(self, rows, _values):  # while a round of copying goes on, another update comes
            self.written_rows += len(rows)
            if self.written_rows < 4:
                log.write(torch.tensor([self.written_rows]), values_of(9, 1))

    table = Table()
    log = UpdateLog(tensors, "factors", written=table.written)
    version, _ = log.pin()
    log.write(torch.tensor([7]), values_of(1, 1))
    log.unpin(version)
    assert tensors["bias"].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    version, overlay = log.pin()
    assert overlay.rows.tolist() == [1]
    log.unpin(version)
    assert tensors["bias"].tolist() == [0, 9, 0, 0, 0, 0, 0, 1]
    log.flush()
    assert tensors["bias"].tolist() == [0, 9, 9, 9, 0, 0, 0, 1] and log.pin()[1] is None


def test_flush_waits_for_readers_that_began_before_and_for_no_others():
    tensors, log = log_of()
    log.flush()
    before, _ = log.pin()
    log.write(torch.tensor([1]), values_of(3, 1))
    after, _ = log.pin()
    flushed = threading.Event()
    thread = threading.Thread(target=lambda: (log.flush(), flushed.set()))
    thread.start()
    assert not flushed.wait(0.2)
    log.unpin(before)
    assert flushed.wait(5) and tensors["bias"][1] == 3
    log.unpin(after)
    thread.join()


def test_an_update_of_no_rows_changes_nothing_also_while_somebody_reads():
    table = ItemTable(torch.zeros(4, 2), bias=torch.zeros(4))
    version, _ = table._log.pin()
    none = torch.tensor([], dtype=torch.int64)
    table.update(none, torch.zeros(0, 2))
    table.update(torch.tensor([1]), bias=torch.ones(1))
    table.update(none, bias=torch.zeros(0))
    assert score_topk(torch.zeros(2), table, 1).ids.tolist() == [[1]]
    table._log.unpin(version)
    assert table.bias.tolist() == [0, 1, 0, 0]


def test_rows_appended_after_a_reader_began_are_not_settled_into_its_tensors():
    newer = Overlay(torch.tensor([1, 6]), torch.tensor([[5.0, 5], [6, 6]]), bias=torch.tensor([7.0, 8]))
    view = TableView(torch.zeros(4, 2), bias=torch.zeros(4), overlay=newer).settled()
    assert view.items.tolist() == [[0, 0], [5, 5], [0, 0], [0, 0]] and view.bias.tolist() == [0, 7, 0, 0]


def test_a_state_replaces_updates_that_still_wait_for_a_reader():
    table = ItemTable(torch.zeros(4, 2))
    before, _ = table._log.pin()
    table.update(torch.tensor([1]), torch.full((1, 2), 3.0))
    loaded = threading.Event()
    state = {"factors": torch.full((4, 2), 7.0)}
    thread = threading.Thread(target=lambda: (table.load_state_dict(state), loaded.set()))
    log = table._log
    thread.start()
    assert not loaded.wait(0.2)
    log.unpin(before)
    thread.join(5)
    assert loaded.is_set() and table.factors.eq(7).all()
