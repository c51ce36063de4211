"""The peers of a cell: tried once, the best variant of each family kept, then measured in turns with ours.

A peer that would take long for nothing is not waited for: what smaller cells took says so beforehand.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..scoring import TopK
from .cells import Cell
from .machine import free_bytes
from .peers import PEERS, Peer, SkipError
from .turns import PAUSE, Call, rounds_for, timed

# Seconds a call, and three times the fastest exact peer (which therefore stays).
_HOPELESS = 5.0
_MOST_OF_FREE = 0.6


class NoRoomError(SkipError):
    """The free memory is too small, at least beside what others hold."""


class Table:
    """Items, and what peers made of them."""

    def __init__(self, items: Tensor) -> None:
        self.items = items
        self._states: dict[Peer, Any] = {}

    def state(self, peer: Peer, users: int, count: int) -> Any:
        """Raises NoRoomError where the peer would take too much of the memory that is free."""
        rows = self.items.shape[0]
        needed = peer.dots_bytes(users, count, rows)
        if peer not in self._states:
            needed += peer.copied * self.items.numel()
        free = free_bytes()
        if free is not None and needed > _MOST_OF_FREE * free:
            raise NoRoomError(f"would take {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} free")
        if peer not in self._states:
            self._states[peer] = peer.prepare(self.items)
        return self._states[peer]

    def forget(self) -> None:
        """Frees what the peers made."""
        self._states.clear()


class _Known(NamedTuple):
    N: int
    k: int
    seconds: float


class Experience:
    """What earlier cells taught: the best variant of each family, and how long it took.

    patience: seconds a call; even the fastest peer is not waited for longer.
    """

    def __init__(self, patience: float = float("inf")) -> None:
        self.patience = patience
        self.chosen: dict[tuple[Cell, str], Peer] = {}  # by the first k tried
        self._known: dict[tuple[Cell, str], list[_Known]] = {}

    def learn(self, cell: Cell, peer: Peer, seconds: float) -> None:
        self.chosen.setdefault((cell._replace(k=0), peer.family), peer)
        self._known.setdefault((cell._replace(k=0, N=0), peer.family), []).append(_Known(cell.N, cell.k, seconds))

    def relearn(self, cell: Cell, milliseconds: dict[str, float]) -> None:
        """From the record of a cell measured earlier."""
        for peer in PEERS:
            if peer.name in milliseconds:
                self.learn(cell, peer, milliseconds[peer.name] / 1e3)

    def hopeless(self, cell: Cell, peers: Iterable[Peer]) -> dict[str, str]:
        """Families that would be far slower than the fastest exact one, with the reason."""
        exact = {peer.family: peer.exact for peer in peers}
        nearest = {family: known for family in exact if (known := self._nearest(cell, family)) is not None}
        predicted = {family: known.seconds * cell.N / known.N for family, known in nearest.items()}
        fastest = min((predicted[family] for family in predicted if exact[family]), default=float("inf"))
        return {
            family: self._reason(cell, nearest[family], seconds)
            for family, seconds in predicted.items()
            if seconds > min(self.patience, max(_HOPELESS, 3 * fastest))
        }

    def _nearest(self, cell: Cell, family: str) -> _Known | None:
        """Of tables and k no larger than the cell's, which can only be faster."""
        known = self._known.get((cell._replace(k=0, N=0), family), [])
        return max((one for one in known if one.N <= cell.N and one.k <= cell.k), default=None)

    @staticmethod
    def _reason(cell: Cell, known: _Known, seconds: float) -> str:
        if known.N == cell.N:
            return f"{seconds:.1f} s at k = {known.k}: not waited for again at a larger k"
        return f"about {seconds:.0f} s, after {known.seconds:.1f} s at N = {known.N:,}: not waited for"


class Contest:
    def __init__(
        self,
        cell: Cell,
        table: Table,
        queries: Tensor,
        ours: TopK,
        experience: Experience,
        peers: Sequence[Peer] = PEERS,
    ) -> None:
        self._cell, self._table, self._queries, self._ours = cell, table, queries, ours
        self._experience = experience
        self.seconds: dict[str, list[float]] = {}
        self.rounds: dict[str, int] = {}
        self.calls: dict[str, Call] = {}
        self.exact: dict[str, bool] = {}
        self.agreement: dict[str, float] = {}
        self._crowded_out: list[Peer] = []
        same_class = [peer for peer in peers if peer.dtype == cell.dtype]
        self.skipped = experience.hopeless(cell, same_class)
        self._try([peer for peer in same_class if peer.family not in self.skipped])

    def next_group(self) -> bool:
        """Frees what the peers so far hold, and admits those that had no room beside them; whether there are any."""
        left, self._crowded_out = self._crowded_out, []
        if not left or not self.calls:
            return False
        self.calls.clear()
        self._table.forget()
        for peer in left:
            del self.skipped[peer.name]
        self._try(left)
        return bool(self.calls)

    def _try(self, peers: Iterable[Peer]) -> None:
        """Admits the fastest variant of each family."""
        cell, experience = self._cell, self._experience
        families: dict[str, list[Peer]] = {}
        for peer in peers:
            families.setdefault(peer.family, []).append(peer)
        for family, variants in families.items():
            chosen = experience.chosen.get((cell._replace(k=0), family))
            trials, no_room = {}, []
            for peer in variants if chosen is None else [chosen]:
                try:
                    state = self._table.state(peer, cell.B, cell.M)
                    call = functools.partial(peer.search, state, self._queries, cell.k, cell.reduce)
                    elapsed, (_, ids) = timed(call)
                except SkipError as reason:
                    self.skipped[peer.name] = str(reason)
                    if isinstance(reason, NoRoomError):
                        no_room.append(peer)
                    continue
                except Exception as error:  # a peer that breaks is its own affair, and is said
                    self.skipped[peer.name] = f"failed: {type(error).__name__}: {error}"
                    continue
                trials[peer] = (elapsed, call, _overlap(ids, self._ours.ids))
            if trials:
                best = min(trials, key=lambda peer: trials[peer][0])
                self._admit(best, *trials[best])
                experience.learn(cell, best, trials[best][0])
            else:
                self._crowded_out += no_room

    def _admit(self, peer: Peer, elapsed: float, call: Call, agreement: float) -> None:
        self.calls[peer.name], self.exact[peer.name] = call, peer.exact
        self.agreement[peer.name] = round(agreement, 4)
        self.rounds[peer.name] = rounds_for(elapsed)
        # One round for the very slow ones, and that is the trial: nothing is warm for them that a second would be.
        self.seconds[peer.name] = [elapsed] if self.rounds[peer.name] == 1 else []

    def turn(self) -> None:
        for name, call in self.calls.items():
            if len(self.seconds[name]) < self.rounds[name]:
                time.sleep(PAUSE)
                self.seconds[name].append(timed(call)[0])

    def summary(self, ms: float) -> dict[str, Any]:
        medians = {name: statistics.median(seconds) * 1e3 for name, seconds in self.seconds.items() if seconds}
        best = min((name for name in medians if self.exact[name]), key=medians.__getitem__, default=None)
        out: dict[str, Any] = {
            "peers_ms": {name: round(value, 3) for name, value in medians.items()},
            "ratios": {name: round(value / ms, 3) for name, value in medians.items()},
            "peer_rounds": {name: len(seconds) for name, seconds in self.seconds.items()},
            "peers_exact": self.exact,
            "agreement": self.agreement,
            "skipped": self.skipped,
            "best_peer": best,
        }
        if best is not None:
            out |= {"best_peer_ms": round(medians[best], 3), "faster_by": round(medians[best] / ms, 3)}
        return out


def _overlap(ids: Tensor, ours: Tensor) -> float:
    """Share of our ids that a peer returned too; ties that it broke otherwise count against it."""
    hits = sum(len(set(a) & set(b)) for a, b in zip(ids.tolist(), ours.tolist(), strict=True))
    return hits / max(1, ours.numel())
