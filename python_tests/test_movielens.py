"""MovieLens from a tiny archive: parsing, the split, and downloads that refuse what they did not expect. No network."""

import dataclasses
import hashlib
import subprocess
import zipfile

import pytest
import torch

from urm_kernels import downloads, movielens

ITEMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
10\tToy Story\t1995\tAnimation Children's Comedy
30\tAmélie, or: tabs\t2001\tComedy Romance
20\tunknown\t\tunknown
40\tToy Story\t1995\tComedy
"""
# user 2 stands first in the file, rates three films in the same second, and 40 before them all
RATINGS = """user_id:token\titem_id:token\trating:float\ttimestamp:float
2\t30\t5\t200
2\t10\t3\t200
1\t10\t4\t300
2\t20\t4\t200
1\t20\t5\t100
2\t40\t5\t150
1\t30\t2\t200
"""


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    write(path, ITEMS, RATINGS)
    return path


def write(path, items, ratings):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.item", items)
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", ratings)


def test_films(wheel):
    films, _ = movielens.read(wheel)
    assert [film.label for film in films] == [
        "Toy Story (1995)",
        "Amélie, or: tabs (2001)",
        "unknown",
        "Toy Story (1995)",
    ]
    assert films[0].text == "Toy Story (1995): Animation, Children's, Comedy"


def test_split_is_by_time_then_file_order(wheel):
    _, (first, second) = movielens.read(wheel)
    assert (first.user, first.films, first.stars) == (1, [2, 1, 0], [5, 2, 4])
    assert (second.user, second.films) == (2, [3, 1, 0, 2])
    assert (second.train, second.validation, second.test) == ([3, 1], 0, 2)
    assert second.seen == [3, 1, 0]


def test_liked_films_end_before_the_test(wheel):
    _, (first, second) = movielens.read(wheel)
    assert first.liked(8) == [2]  # film 0 is liked too, but it is the test
    assert second.liked(8) == [3, 1]
    assert second.liked(1) == [1]


def test_split_hash_is_as_its_docstring_says(wheel):
    _, histories = movielens.read(wheel)
    assert movielens.split_sha256(histories) == hashlib.sha256(b"1\t2\t1\t0\n2\t3 1\t0\t2\n").hexdigest()


def test_tensors(wheel):
    films, histories = movielens.read(wheel)
    assert movielens.padded([h.seen for h in histories]).tolist() == [[2, 1, -1], [3, 1, 0]]
    assert movielens.popularity(histories, len(films)).tolist() == [0, 1, 1, 1]
    vectors = torch.randn(len(films), 5)
    queries, mask = movielens.user_queries(histories, vectors, 3)
    assert mask.tolist() == [[True, False, False], [True, True, False]]
    assert torch.equal(queries[1, :2], vectors[[3, 1]])
    assert (queries[~mask] == 0).all()


@pytest.mark.parametrize(
    ("items", "ratings", "words"),
    [
        (ITEMS.replace("movie_title", "title"), RATINGS, "movie_title not among item_id, title"),
        (ITEMS, RATINGS.replace("2\t10\t3\t200", "2\t10\t3"), "line 3: 4 fields are wanted, 3 came"),
        (ITEMS, RATINGS + "3\t10\t4\t1\n", r"users \[3\]: at least three ratings"),
    ],
)
def test_broken_files_are_refused_in_words(tmp_path, items, ratings, words):
    write(tmp_path / "broken.whl", items, ratings)
    with pytest.raises(ValueError, match=words):
        movielens.read(tmp_path / "broken.whl")


def package(wheel):
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return downloads.Package("tiny", "1.0", wheel.name, sha256, "notice")


def test_cached_file_is_taken_without_pip(wheel, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert downloads.fetch(package(wheel), wheel.parent) == wheel


def test_tampered_file_is_refused(wheel):
    wanted = package(wheel)
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(downloads.DownloadError, match="not the file expected"):
        downloads.fetch(wanted, wheel.parent)


def test_without_network_the_error_says_what_to_place_where(wheel, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retry\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    cache = tmp_path / "empty"
    with pytest.raises(downloads.DownloadError) as caught:
        downloads.fetch(dataclasses.replace(package(wheel), wheel="absent.whl"), cache)
    for word in ("tiny==1.0", "No matching distribution", "pip download --no-deps", "absent.whl", str(cache)):
        assert word in str(caught.value)
