"""Several threads at once, fork, Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from support import PACKAGE_ROOT, REDUCTIONS, assert_same_bits, by_reference, run_python

from urm_kernels import ItemTable, score_topk
from urm_kernels.testing import forced, make_items, make_queries


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_eight_python_threads_at_once(monkeypatch, backend):
    monkeypatch.setenv("URM_NUM_THREADS", "3")
    rows, rounds = (12_000, 6) if backend == "cpu" else (300, 2)
    items = make_items("integer", rows, 24, 1)
    work = [(make_queries("integer", 2, 1 + 3 * i, 24, i, items), REDUCTIONS[i % 4]) for i in range(8)]
    wanted = [by_reference(q, items, 50, reduce=reduce) for q, reduce in work]
    barrier, wrong = threading.Barrier(8), []

    def run(place):
        queries, reduce = work[place]
        barrier.wait()
        for _ in range(rounds):
            try:
                assert_same_bits(score_topk(queries, items, 50, reduce=reduce, backend=backend), wanted[place])
            except BaseException as error:
                wrong.append((place, error))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_mask_that_is_changed_during_a_call_leads_nowhere_outside(monkeypatch):
    """Any rows, but such as there are. The sanitizer sees what is read for them."""
    monkeypatch.setenv("URM_NUM_THREADS", "1")
    rows = (1 << 20) + 5  # a whole number of words of blocks, and rows behind them
    table = ItemTable(torch.randn(rows, 8)).pack(("int4",))
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[-5:] = True
    changing, done = mask[: 1 << 16].numpy(), threading.Event()

    def change():
        while not done.is_set():
            changing[:] = True
            changing[:] = False

    writer = threading.Thread(target=change)
    writer.start()
    try:
        with forced("cpu", scan="bounded"):
            for _ in range(500):
                ids = score_topk(torch.randn(1, 8), table, 20, mask=mask).ids
                assert (ids >= -1).all() and (ids < rows).all()
    finally:
        done.set()
        writer.join()


def test_threads_keep_their_own_denormal_mode(monkeypatch):
    # One thread flushes, the other does not, both share the pool: each finds its own mode after each call.
    monkeypatch.setenv("URM_NUM_THREADS", "2")
    items = torch.rand(20_000, 16) * 1e-20
    queries = torch.rand(1, 1, 16) * 1e-20
    wanted, seen = score_topk(queries, items, 20, backend="cpu"), []

    def run(flush, smallest=5e-324):
        torch.set_flush_denormal(flush)
        for _ in range(10):
            result = score_topk(queries, items, 20, backend="cpu")
            same = torch.equal(result.scores.view(torch.int32), wanted.scores.view(torch.int32))
            seen.append((same, (smallest * 1.0 == 0.0) == flush))

    threads = [threading.Thread(target=run, args=(flush,)) for flush in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 30 and all(same and kept for same, kept in seen)


# Torch's own parallel operations hang in a child whose parent has used them, and the reference is made of them: it
# forks with one torch thread.
@pytest.mark.parametrize(("backend", "torch_threads"), [("cpu", "2"), ("reference", "1")])
def test_fork_after_use_works_in_the_child_and_in_the_parent(backend, torch_threads):
    out = run_python(
        f"""
        import os, sys
        import torch
        from urm_kernels import score_topk
        items, queries = torch.randn(30000, 32), torch.randn(2, 6, 32)
        exclude = torch.arange(8).view(2, 4)
        def call():
            return score_topk(queries, items[: 30000 if "{backend}" == "cpu" else 500], 20, exclude=exclude,
                              backend="{backend}")
        before = call()
        def same():
            after = call()
            return torch.equal(before.ids, after.ids) and torch.equal(before.scores, after.scores)
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                fine = same() and same()
                grandchild = os.fork()
                if grandchild == 0:
                    os._exit(0 if same() else 1)
                fine &= os.waitpid(grandchild, 0)[1] == 0
                os._exit(0 if fine and same() else 1)
            children.append(child)
            assert same()
        print([os.waitpid(child, 0)[1] for child in children], same())
        """,
        URM_NUM_THREADS="3",
        OMP_NUM_THREADS=torch_threads,
    )
    assert out == "[0, 0, 0] True\n"


def test_multiprocessing_by_fork():
    out = run_python(
        """
        import multiprocessing
        import torch
        from urm_kernels import score_topk
        items = torch.randn(30000, 32, generator=torch.Generator().manual_seed(1))
        def job(seed):
            queries = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(seed))
            return score_topk(queries, items, 20).ids.tolist()
        here = [job(seed) for seed in range(6)]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            there = pool.map(job, range(6))
        print(here == there == [job(seed) for seed in range(6)])
        """,
        URM_NUM_THREADS="3",
    )
    assert out == "True\n"


def test_fork_while_another_thread_is_scanning():
    out = run_python(
        """
        import os, threading
        import torch
        from urm_kernels import score_topk
        items, queries = torch.randn(30000, 32), torch.randn(2, 6, 32)
        wanted = score_topk(queries, items, 20)
        stop = threading.Event()
        def scan():
            while not stop.is_set():
                score_topk(queries, items, 20)
        thread = threading.Thread(target=scan)
        thread.start()
        statuses = []
        for _ in range(20):
            child = os.fork()
            if child == 0:
                result = score_topk(queries, items, 20)
                os._exit(0 if torch.equal(result.ids, wanted.ids) else 1)
            statuses.append(os.waitpid(child, 0)[1])
        stop.set()
        thread.join()
        print(statuses == [0] * 20)
        """,
        URM_NUM_THREADS="3",
    )
    assert out == "True\n"


LONG = """
import os
import signal
import torch
from urm_kernels import score_topk
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process is started without it
items = torch.ones(1, 16).expand(2**31, 16)
small = torch.arange(40.0).view(10, 4)
queries = torch.ones({users}, {count}, 16)
score_topk(small[0], small, 2)
print("ready", flush=True)
try:
    score_topk(queries, items, 10)
    print("came to the end", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(score_topk(small[9], small, 2).ids.tolist(), flush=True)
"""


@pytest.mark.parametrize(("users", "count"), [(1, 64), (1, 8), (100, 16)])
def test_ctrl_c_ends_a_long_scan_and_the_process_can_call_again(monkeypatch, users, count):
    monkeypatch.setenv("PYTHONPATH", PACKAGE_ROOT)
    process = subprocess.Popen(
        [sys.executable, "-c", LONG.format(users=users, count=count)], stdout=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(60, process.kill)  # which ends a readline that would wait for ever
    watchdog.start()
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.7)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - sent < 2.0
        assert process.stdout.readline() == "[[9, 8]]\n"
        assert process.wait(timeout=20) == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.stdout.close()


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors"
)
def test_helpers_keep_to_the_processors_that_they_are_allowed():
    """They leave their caller's processor, though not for one that the user takes away while they sleep."""
    out = run_python(
        """
        import os, time, torch
        from urm_kernels import score_topk
        items, queries = torch.randn(40_000, 64), torch.randn(2, 8, 64)
        def call():
            time.sleep(0.001)  # helpers have stopped spinning and are woken
            return score_topk(queries, items, 10, backend="cpu").ids
        tasks = lambda: [int(task) for task in os.listdir("/proc/self/task")]
        wanted, allowed = call(), os.sched_getaffinity(0)
        for _ in range(50):
            call()
        assert all(os.sched_getaffinity(task) and os.sched_getaffinity(task) <= allowed for task in tasks())
        one = {min(allowed)}
        for task in tasks():
            os.sched_setaffinity(task, one)
        same = all(torch.equal(call(), wanted) for _ in range(50))
        print(same, all(os.sched_getaffinity(task) == one for task in tasks()))
        """,
        URM_NUM_THREADS="3",
    )
    assert out == "True True\n"


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors"
)
def test_a_helper_that_is_woken_on_its_callers_processor_leaves_it():
    out = run_python(
        """
        import os, threading, time, torch
        from urm_kernels import score_topk
        items, queries = torch.randn(40_000, 64), torch.randn(2, 8, 64)
        def call():
            score_topk(queries, items, 10, backend="cpu")
            time.sleep(0.001)  # helpers have stopped spinning and will be woken
        tasks = lambda: {int(task) for task in os.listdir("/proc/self/task")}
        before, allowed, caller = tasks(), os.sched_getaffinity(0), threading.get_native_id()
        call()
        (helper,) = tasks() - before
        here = {min(allowed)}
        os.sched_setaffinity(helper, here)
        left = False
        for _ in range(200):
            os.sched_setaffinity(caller, here)
            os.sched_setaffinity(caller, allowed)  # it stays where it is unless others want to run there
            call()
            left = left or os.sched_getaffinity(helper) != here
        print(left, os.sched_getaffinity(helper) <= allowed)
        """,
        URM_NUM_THREADS="2",
        URM_CPU_SCAN="exact",
    )
    assert out == "True True\n"


def test_the_interpreter_exits_while_a_daemon_thread_scans():
    out = run_python("""
        import threading, time
        import torch
        from urm_kernels import score_topk
        items, queries = torch.ones(1, 16).expand(2**27, 16), torch.ones(4, 8, 16)
        threading.Thread(target=score_topk, args=(queries, items, 3), daemon=True).start()
        time.sleep(0.3)
        print("leaving")
    """)
    assert out == "leaving\n"


def test_a_signal_handler_may_scan_during_a_scan(cheap_isa):
    # The handler also lets torch use the processor's tiles (bfloat16 products) in its own way.
    out = run_python(
        """
        import os, signal
        import torch
        from urm_kernels import score_topk
        generator = torch.Generator().manual_seed(0)
        items = torch.randn(4096, 32, generator=generator).repeat(150, 1)
        queries = torch.randn(60, 8, 32, generator=generator)
        wanted = score_topk(queries, items[:4096], 5)
        os.environ["URM_CPU_SCAN"] = "bounded"
        calls = []
        def handler(signum, frame):
            if len(calls) < 20:
                torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
                calls.append(score_topk(queries, items[:4096], 5))
        signal.signal(signal.SIGALRM, handler)
        while len(calls) < 3:
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            result = score_topk(queries, items, 5 * 150)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for inner in calls:
            assert torch.equal(inner.scores, wanted.scores) and torch.equal(inner.ids, wanted.ids)
        assert torch.equal(result.scores[:, ::150], wanted.scores) and torch.equal(result.ids[:, ::150], wanted.ids)
        print("done")
        """,
        URM_CPU_ISA=cheap_isa,
        URM_CPU_SCAN="exact",
    )
    assert out == "done\n"


def test_torch_products_in_between_change_nothing_and_are_not_changed(monkeypatch, cheap_isa):
    items = make_items("iid", 5000, 64, 1)
    queries = make_queries("iid", 3, 8, 64, 1, items)
    left, right = items[:256].bfloat16(), items[256:512].bfloat16().T
    wanted, product = by_reference(queries, items, 50), left @ right
    monkeypatch.setenv("URM_CPU_ISA", cheap_isa)
    monkeypatch.setenv("URM_CPU_SCAN", "bounded")
    for _ in range(5):
        assert_same_bits(score_topk(queries, items, 50), wanted)
        assert torch.equal(left @ right, product)
