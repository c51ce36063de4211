"""Hostile table files by the million: `python fuzz_table_file.py --files 1000000 --seed 0`.

Valid files of several kinds are mutated: bytes flipped, pieces spliced, ends cut off, numbers and structure of the
header changed. Each is loaded as a map; where that succeeds its names are looked up, and it is scored. The only ends
that are allowed are success, ValueError and OSError; a crash ends a worker process and names its file, which file
number and seed make again:

    python fuzz_table_file.py --show SEED NUMBER > table.safetensors

Every worker may take 64 MiB beyond what it had before its first file.
"""

import argparse
import collections
import copy
import io
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ROOM = 64 << 20  # bytes of address space beyond what a warm worker has
_BATCH = 20_000  # files a worker process
_SIZES = [0, 1, 7, 8, 9, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -1]
_VALUES = [*_SIZES, 1.0, 2.0, -0.0, float("nan"), float("inf"), True, None, "", "F32", "F64", "U8", [], [0], {}, [[]]]
_NUMBERS = [0, 1, -1, 2**63 - 1, -(2**63), 2**62, -(2**62), 2**32, 3, 8]


def pack(header, data):
    """A safetensors file: the length, the header (a dict, or bytes), the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def unpack(file):
    """(header, data) of a valid file."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def seeds(folder):
    """Bytes of valid files of every kind."""
    import torch

    from urm_kernels import ItemTable

    def saved(table):
        table.save(Path(folder) / "seed")
        return (Path(folder) / "seed").read_bytes()

    torch.manual_seed(0)
    made = torch.randn(9, 3)
    strings = ["", "a", "é", "日本", "b\0c", "n5", "n6", "n7", "n8"]
    with_text = {"text": torch.randn(9, 2), "text_projection": torch.randn(2, 3)}
    removed = ItemTable(made.bfloat16(), bias=torch.randn(9), ids=strings)
    removed.remove(torch.tensor([2, 8]))
    files = [
        saved(ItemTable(made, bias=torch.randn(9), ids=torch.arange(9) * 5)),
        saved(ItemTable(made.to(torch.float8_e4m3fn), row_scale=torch.rand(9))),
        saved(ItemTable(made.half(), ids=strings[:9], **with_text)),
        saved(removed),
        saved(ItemTable(made[:4], ids=strings[:4])),
        saved(ItemTable(made[:0], bias=torch.randn(0), ids=[])),
    ]
    header, data = unpack(files[0])
    header["__metadata__"]["urm_kernels"] = header["__metadata__"]["urm_kernels"].replace('"format": 2', '"format": 1')
    return [*files, pack(header, data)]


def mutated(files, seed, number):
    """File `number`: the same bytes whenever and wherever it is made."""
    rng = random.Random(f"{seed}:{number}")
    file = rng.choice(files)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        file = rng.choice(_MUTATIONS)(rng, files, file)
    return file


def _flip(rng, _files, file):
    changed = bytearray(file)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if changed:
            at = rng.randrange(min(len(changed), 16) if rng.random() < 0.1 else len(changed))
            changed[at] = rng.choice([changed[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255])
    return bytes(changed)


def _cut(rng, _files, file):
    at = rng.randrange(len(file) + 1)
    return rng.choice([file[:at], file[at:], file + bytes(rng.randrange(40)), file[:at] + file[at + 8 :]])


def _splice(rng, files, file):
    other = rng.choice(files)
    start = rng.randrange(len(other))
    piece = other[start : start + rng.randrange(64)]
    at = rng.randrange(len(file) + 1)
    return file[:at] + piece + file[at + (len(piece) if rng.random() < 0.5 else 0) :]


def _length(rng, _files, file):
    value = rng.choice([*_NUMBERS, 1 << 20, (1 << 20) + 1, len(file) - 8, len(file) - 7, len(file)])
    return struct.pack("<Q", value % 2**64) + file[8:]


def _header(rng, _files, file):
    """Another value at a random place of the header or the metadata, with a length that fits."""
    try:
        header, data = unpack(file)
        described = json.loads(header["__metadata__"]["urm_kernels"])
    except (ValueError, struct.error, TypeError, KeyError, RecursionError):
        return _flip(rng, _files, file)
    if rng.random() < 0.3:
        _disturb(rng, described)
    else:
        _disturb(rng, header)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["urm_kernels"] = json.dumps(described)
    text = json.dumps(header)
    if rng.random() < 0.1:  # a key twice, with another value the second time
        name = rng.choice(list(header))
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(rng.choice([*header.values(), *_VALUES]))}}}"
    if rng.random() < 0.002:
        piece = rng.choice(["[", "[[],", "{},", '{"a":', "1.5,", '"ab",'])
        text = text[:-1] + ', "large": [' + piece * (rng.randrange(1 << 20) // len(piece))
        text += rng.choice(["", "0]}", "1" * 5000 + "]}"])
    return pack(text.encode("utf-8", "surrogatepass"), data)


def _disturb(rng, node):
    """One value, somewhere below, becomes another; or a key goes, comes or is renamed."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        action = rng.randrange(6)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            name = rng.choice(["factors", "text", "bias", "alive", "ids", "id_text", "id_offsets", "x"])
            node[name] = copy.deepcopy(node[key])
        elif action <= 3 and type(node[key]) is int:
            node[key] += rng.choice([-8, -4, -1, 1, 2, 4, 8, 2**32, 2**63, 2**64, -(2**64)])
        else:
            node[key] = copy.deepcopy(rng.choice(_VALUES))
        return


def _data(rng, _files, file):
    """Extreme numbers where the data are: offsets, ids, bits and factors."""
    try:
        header, data = unpack(file)
        entry = header[rng.choice(["id_offsets", "id_offsets", "ids", "alive", "id_text", "factors"])]
        first, last = (int(place) for place in entry["data_offsets"])
    except (ValueError, OverflowError, struct.error, TypeError, KeyError, RecursionError):
        return _flip(rng, _files, file)
    changed = bytearray(data)
    count = (last - first) // 8 if 0 <= first <= last <= len(data) else 0
    for _ in range(rng.choice([1, 2, 3, 5, count])):
        if count:
            at = first + rng.randrange(count) * 8
            changed[at : at + 8] = struct.pack("<q", rng.choice([*_NUMBERS, rng.randrange(40)]))
    return file[: len(file) - len(data)] + bytes(changed)


_MUTATIONS = [_flip, _flip, _cut, _splice, _length, _header, _header, _header, _data, _data]


def use(path):
    """Loads and uses one file; how that ended."""
    import torch

    from urm_kernels import ItemTable, score_topk

    try:
        table = ItemTable.load(path, mmap=True)
    except (ValueError, OSError):
        return "refused"
    said = repr(table)
    assert len(said) < 1000, said
    ended = "used"
    for attempt in (_named, _found, _compacted):
        try:
            attempt(table)
        except ValueError:
            ended = "names refused"
    if len(table) <= 1000 and table.factors.shape[1] <= 1000:
        rows, columns = table.factors.shape
        result = score_topk(torch.ones(1, columns, dtype=torch.float32), table, min(rows, 5) + 1)
        assert int(result.ids.max()) < rows
    return ended


def _named(table):
    table.to_external(_some(table))
    table.to_external(_some(table) - 1)


def _found(table):
    if table.id_text is not None:
        table.rows_of(["a", "a"][: len(table)])
    elif table.count() == len(table):
        table.rows_of(table.to_external(_some(table)))


def _compacted(table):
    if table.id_text is not None or table.alive is not None:
        changed = table.clone()
        if changed.alive is None:
            changed.remove(_some(table)[:1])
        changed.compact()


def _some(table):
    import torch

    return torch.arange(min(len(table), 16))


def _mapped():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[0]) * resource.getpagesize()


def work(seed, first, count, folder):
    """A worker: files [first, first + count). Says on standard output how they ended; leaves the number of the file in
    hand in the folder, for whoever finds this process dead."""
    import torch

    torch.set_num_threads(1)
    files = seeds(folder)
    path, at = Path(folder) / "table", Path(folder) / "at"
    for file in files * 3:
        path.write_bytes(file)
        assert use(path) == "used"
    before, peak = _mapped(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (before + _ROOM, resource.RLIM_INFINITY))
    ends, wrong = collections.Counter(), []

    def tell():
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        print(json.dumps({"ends": ends, "wrong": wrong, "grown": grown}), flush=True)

    with open(at, "wb", buffering=0) as progress:
        for number in range(first, first + count):
            progress.seek(0)
            progress.write(b"%20d" % number)
            path.write_bytes(mutated(files, seed, number))
            try:
                ends[use(path)] += 1
            except Exception as error:
                ends["WRONG"] += 1
                if len(wrong) < 20:
                    wrong.append((number, f"{type(error).__name__}: {str(error)[:200]}"))
                    tell()
            if number % 500 == 499:
                tell()
    tell()


def fuzz(count, seed, workers=None, batch=_BATCH, say=None, most_crashes=20):
    """(ends: how many files ended how, wrong: [(number, what)], most bytes that a worker grew by, seconds).

    Of a worker that crashed, files since it last told (500 at most) are missing in ends.
    """
    workers = workers or os.cpu_count() or 1
    environment = {k: v for k, v in os.environ.items() if not k.startswith("URM_")} | {"URM_NUM_THREADS": "1"}
    here = str(Path(__file__).resolve())
    ends, wrong, grown, began = collections.Counter(), [], 0, time.monotonic()
    waiting = collections.deque((first, min(batch, count - first)) for first in range(0, count, batch))
    running = {}
    while waiting or running:
        while waiting and len(running) < workers:
            first, size = waiting.popleft()
            folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
            command = [sys.executable, here, "--work", str(seed), str(first), str(size), folder]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            running[process] = first, size, folder
        process = next((p for p in running if p.poll() is not None), None)
        if process is None:
            time.sleep(0.02)
            continue
        first, size, folder = running.pop(process)
        out, err = process.communicate()
        for line in out.splitlines()[-1:]:
            told = json.loads(line)
            ends.update(told["ends"])
            wrong += [tuple(w) for w in told["wrong"]]
            grown = max(grown, told["grown"])
        if process.returncode:
            at = Path(folder) / "at"
            number = int(at.read_bytes()) if at.exists() else first
            ends["CRASHED"] += 1
            last = err.strip().splitlines()[-1:] or [""]
            wrong.append((number, f"worker ended with {process.returncode}: {last[0][:200]}"))
            if number + 1 < first + size:
                waiting.append((number + 1, first + size - number - 1))
            if ends["CRASHED"] >= most_crashes:
                waiting.clear()
        shutil.rmtree(folder, ignore_errors=True)
        if say:
            done, spent = sum(ends.values()), time.monotonic() - began
            say(f"{done} of {count} files, {done / spent:.0f} a second, {dict(ends)}, grown by {grown >> 10} KiB")
    return ends, sorted(wrong), grown, time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--show", nargs=2, type=int, metavar=("SEED", "NUMBER"), help="writes one file to stdout")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        return work(int(given.work[0]), int(given.work[1]), int(given.work[2]), given.work[3])
    if given.show:
        with tempfile.TemporaryDirectory() as folder:
            io.FileIO(1, "w").write(mutated(seeds(folder), *given.show))
        return None
    ends, wrong, grown, seconds = fuzz(
        given.files, given.seed, given.workers, say=lambda line: print(f"\r{line}", end="", flush=True)
    )
    print(f"\n{sum(ends.values())} files in {seconds:.0f} s: {dict(ends)}; workers grew by {grown >> 10} KiB at most")
    for number, what in wrong[:50]:
        print(f"  --show {given.seed} {number}  {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
