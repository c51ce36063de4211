"""What a hostile table file may cost, what is no file, and many of them: memory, waiting, the fuzzer."""

import os
import threading
import tracemalloc

import pytest
from fuzz_table_file import fuzz, pack, seeds
from test_table_file import META, plain

from urm_kernels import ItemTable, table_file

WORST = {"lists": "[],", "objects": "{},", "numbers": "1.5,", "strings": '"ab",', "names": None}


@pytest.mark.parametrize("kind", WORST)
def test_validation_of_the_worst_header_takes_less_than_64_mebibytes(tmp_path, kind):
    room = table_file._MAX_HEADER - 300
    if WORST[kind] is None:
        filler = "".join(f'"{i:x}":{{}},' for i in range(room // 11))
        header = "{" + filler + META + "}"
    else:
        header = '{"large": [' + WORST[kind] * (room // len(WORST[kind])) + "0], " + META + "}"
    path = tmp_path / "t"
    path.write_bytes(pack(header.encode(), b""))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="path") as caught:
            table_file.validated(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 10_000, "words, not the whole file again"


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "t"
    with open(path, "wb") as file:  # sparse
        file.write(plain(2**30, 64, factors=("F32", [2**30, 64], b"")))
        file.truncate(1 << 40)
    tracemalloc.start()
    with pytest.raises(ValueError, match="path"):
        table_file.validated(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_two_thousand_mutated_files_end_in_words_or_in_a_table_that_scores():
    ends, wrong, grown, _ = fuzz(2000, seed=1, workers=2, batch=1000, most_crashes=3)
    assert not wrong, f"{len(wrong)} of 2000, e.g. {wrong[:5]}"
    assert sum(ends.values()) == 2000 and ends["used"] > 100 and ends["refused"] > 1000
    assert grown < 64 << 20


def test_the_fuzzers_files_are_the_same_every_time(tmp_path):
    from fuzz_table_file import mutated

    files = seeds(tmp_path)
    first = [mutated(files, 3, number) for number in range(50)]
    assert first == [mutated(seeds(tmp_path), 3, number) for number in range(50)] and len(set(first)) > 45


def test_what_is_no_file_raises_an_oserror_or_valueerror_and_does_not_wait(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    for path, error in ((tmp_path, OSError), (tmp_path / "none", OSError), (tmp_path / "empty", ValueError)):
        with pytest.raises(error):
            ItemTable.load(path)
    with pytest.raises((OSError, ValueError)):
        ItemTable.load("/dev/zero")
    ended = []

    def load_fifo():
        try:
            ItemTable.load(tmp_path / "fifo")
        except (OSError, ValueError) as error:
            ended.append(error)

    thread = threading.Thread(target=load_fifo, daemon=True)
    thread.start()
    thread.join(5)
    waited = thread.is_alive()
    if waited:
        os.close(os.open(tmp_path / "fifo", os.O_WRONLY))  # lets it go on
        thread.join(5)
    assert ended and not waited
