"""A table against plain lists and tensors: whatever is done to it, in whatever order, it scores as what it should hold.

All factors and queries are small whole numbers, so that plain torch gives every bit of the scores.
"""

import copy
import io
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import bits

from urm_kernels import ItemTable, log_partition, ops, score_candidates, score_topk
from urm_kernels.table import Serving

STRINGS = ["", "a", "aa", "é", "e\u0301", "日本", "😀", "a\0b", "\0", " a", "x" * 300, *(f"n{i}" for i in range(60))]
NUMBERS = [0, -1, 2**63 - 1, -(2**63), 2**32, *range(7, 70)]
SCALES = [0.5, 1.0, 0.3, -2.0, 1e-3]
TEXT_WIDTH = 2


class Row:
    """One row as the caller gave it."""

    def __init__(self, factors, text, scale, bias, name):
        self.factors, self.text, self.scale, self.bias, self.name = factors, text, scale, bias, name
        self.alive = True


class TableMachine(RuleBasedStateMachine):
    """Rows live in a list of Row; the table must tell the same of them after every step."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.pinned = None

    def teardown(self):
        self.release()
        self.folder.cleanup()

    @initialize(
        r=st.sampled_from([1, 4, 16, 19]),
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]),
        names=st.sampled_from([None, "strings", "numbers"]),
        parts=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
        rows=st.integers(0, 40),
        seed=st.integers(0, 2**20),
    )
    def begin(self, r, dtype, names, parts, rows, seed):
        self.r, self.dtype, self.names = r, dtype, names
        self.has_text, self.has_scale, self.has_bias, self.trainable = parts
        self.trainable &= dtype != torch.float8_e4m3fn
        self.vector_dtype = torch.float32
        self.generator = torch.Generator().manual_seed(seed)
        self.projection = self.whole(-1, 2, TEXT_WIDTH, r) if self.has_text else None
        self.rows = self.new_rows(rows)
        given = self.given(self.rows)
        self.table = ItemTable(
            given.pop("factors").to(dtype), trainable=self.trainable, text_projection=self.projection, **given
        )
        self.queries = self.whole(-2, 3, 2, 2, r)

    def whole(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator).float()

    def new_rows(self, count):
        pool = {"strings": STRINGS, "numbers": NUMBERS, None: [None] * 200}[self.names]
        free = pool if self.names is None else [n for n in pool if n not in {row.name for row in self.living()}]
        order = torch.randperm(len(free), generator=self.generator).tolist()[:count]
        return [self.new_row(free[i]) for i in order]

    def new_row(self, name):
        scale = torch.tensor(SCALES)[int(self.whole(0, len(SCALES)))].to(self.vector_dtype).item()
        bias = torch.randn((), generator=self.generator).to(self.vector_dtype).item()
        return Row(self.whole(-3, 4, self.r), self.whole(-1, 2, TEXT_WIDTH), scale, bias, name)

    def living(self):
        return [row for row in getattr(self, "rows", []) if row.alive]

    def places(self):
        return [i for i, row in enumerate(self.rows) if row.alive]

    def given(self, rows, only=("factors", "text", "row_scale", "bias", "ids")):
        """What a caller passes for these rows, of the parts that this table has."""
        parts = {"factors": torch.stack([row.factors for row in rows]) if rows else torch.zeros(0, self.r)}
        if self.has_text:
            parts["text"] = torch.stack([row.text for row in rows]) if rows else torch.zeros(0, TEXT_WIDTH)
        if self.has_scale:
            parts["row_scale"] = torch.tensor([row.scale for row in rows], dtype=torch.float32)
        if self.has_bias:
            parts["bias"] = torch.tensor([row.bias for row in rows], dtype=torch.float32)
        if self.names is not None and "ids" in only:
            listed = [row.name for row in rows]
            parts["ids"] = listed if self.names == "strings" else torch.tensor(listed, dtype=torch.int64)
        return {name: part for name, part in parts.items() if name in only}

    def release(self):
        """The reader that began some steps ago ends: nobody keeps an update waiting any more."""
        if self.pinned is not None:
            log, version = self.pinned
            self.pinned = None
            log.unpin(version)

    @rule(count=st.integers(0, 30))
    def append(self, count):
        self.release()
        before, more = len(self.rows), self.new_rows(count)
        rows = self.table.append(**self.given(more))
        self.rows += more
        assert rows.tolist() == list(range(before, before + len(more)))

    @precondition(lambda self: self.names is not None and self.living())
    @rule(data=st.data())
    def append_of_a_name_that_is_there_is_refused_and_changes_nothing(self, data):
        taken = data.draw(st.sampled_from(self.living())).name
        with pytest.raises(ValueError, match="ids"):
            self.table.append(**self.given([*self.new_rows(1), self.new_row(taken)]))

    @precondition(lambda self: self.living())
    @rule(data=st.data(), part=st.sets(st.sampled_from(["factors", "text", "row_scale", "bias"]), min_size=1))
    def update(self, data, part):
        part &= {"factors"} | {n for n, has in self.has().items() if has}
        if not part:
            return
        places = data.draw(st.lists(st.sampled_from(self.places()), unique=True, max_size=20))
        fresh = [self.new_row(None) for _ in places]
        self.table.update(torch.tensor(places, dtype=torch.int64), **self.given(fresh, part))
        for place, row in zip(places, fresh, strict=True):
            held = self.rows[place]
            held.factors = row.factors if "factors" in part else held.factors
            held.text = row.text if "text" in part else held.text
            held.scale = row.scale if "row_scale" in part else held.scale
            held.bias = row.bias if "bias" in part else held.bias

    def has(self):
        return {"text": self.has_text, "row_scale": self.has_scale, "bias": self.has_bias}

    @precondition(lambda self: self.living())
    @rule(data=st.data())
    def remove(self, data):
        places = data.draw(st.lists(st.sampled_from(self.places()), min_size=1, max_size=12))
        self.table.remove(torch.tensor(places))
        for place in places:
            self.rows[place].alive = False
        with pytest.raises(ValueError, match="has been removed"):
            self.table.update(torch.tensor(places[:1]), torch.zeros(1, self.r))

    @rule()
    def compact(self):
        self.release()
        moved = self.table.compact().tolist()
        wanted, following = [], 0
        for row in self.rows:
            wanted.append(following if row.alive else -1)
            following += row.alive
        self.rows = self.living()
        assert moved == wanted and self.table.alive is None

    @precondition(lambda self: self.pinned is None)
    @rule()
    def a_reader_begins_and_stays(self):
        """Updates now wait beside the table, where calls that begin later must find them."""
        log = self.table._log
        self.pinned = log, log.pin()[0]

    @rule()
    def the_reader_ends(self):
        self.release()

    @rule(mmap=st.booleans())
    def save_and_load(self, mmap):
        self.release()
        path = Path(self.folder.name) / "t.safetensors"
        self.table.save(path)
        self.table = ItemTable.load(path, mmap=mmap, trainable=self.trainable)
        if mmap and self.rows and not self.trainable:  # which are read into memory
            self.check()
            with pytest.raises(RuntimeError, match="read-only"):
                self.table.remove(torch.tensor([], dtype=torch.int64))
        if mmap:
            self.table = self.table.clone()

    @rule(how=st.sampled_from(["clone", "deepcopy", "pickle", "torch.save"]))
    def copy(self, how):
        self.release()
        before = self.table
        if how == "clone":
            self.table = before.clone()
        elif how == "deepcopy":
            self.table = copy.deepcopy(before)
        elif how == "pickle" and self.dtype != torch.float8_e4m3fn:  # which torch itself saves, but does not pickle
            self.table = pickle.loads(pickle.dumps(before))
        else:
            kept = io.BytesIO()
            torch.save(before, kept)
            self.table = torch.load(io.BytesIO(kept.getvalue()), weights_only=False)
        if self.rows:  # the copy's memory is its own
            assert self.table.factors.data_ptr() != before.factors.data_ptr()
        assert {type(p) for p in self.table.parameters()} == {type(p) for p in before.parameters()}

    @rule(through_a_file=st.booleans())
    def state_dict_round_trip(self, through_a_file):
        self.release()
        state = self.table.state_dict()
        if through_a_file:
            kept = io.BytesIO()
            torch.save(state, kept)
            state = torch.load(io.BytesIO(kept.getvalue()), weights_only=True)
        kept_rows, self.rows = self.rows, []
        other = self.new_rows(3)
        self.rows = kept_rows
        given = self.given(other)
        fresh = ItemTable(
            given.pop("factors").to(self.dtype),
            trainable=self.trainable,
            text_projection=None if self.projection is None else torch.zeros_like(self.projection),
            **given,
        ).to(self.vector_dtype if self.vector_dtype != torch.float32 else None)
        assert not any(fresh.load_state_dict(state))
        self.table = fresh

    @rule(dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    def to_another_dtype(self, dtype):
        self.release()
        assert self.table.to(dtype) is self.table
        self.dtype = self.vector_dtype = dtype
        for row in self.rows:
            row.scale, row.bias = (torch.tensor(v).to(dtype).item() for v in (row.scale, row.bias))

    @rule()
    def refresh_changes_nothing(self):
        self.release()
        self.table.refresh()

    def expected(self):
        """(scores [B, N] by plain torch, items, bias, row_scale) of what the rows should hold."""
        parts = self.given(self.rows)
        items = parts["factors"]
        if self.has_text:
            items = items + parts["text"] @ self.projection
        dots = self.queries @ items.T  # whole numbers below 2**24: exact
        bias = parts["bias"].to(self.vector_dtype) if self.has_bias else None
        scale = parts["row_scale"].to(self.vector_dtype) if self.has_scale else None
        if scale is not None:
            dots = dots * scale.float()
        scores = dots.amax(1)
        if bias is not None:
            scores = scores + bias.float()
        return scores + 0.0, items, bias, scale

    @invariant()
    def check(self):
        if not hasattr(self, "table"):
            return
        table, count = self.table, len(self.rows)
        scores, items, bias, scale = self.expected()
        with torch.no_grad():
            there = torch.tensor([row.alive for row in self.rows], dtype=torch.bool)
            got = score_topk(self.queries, table, count + 2)
            order = scores[:, there].argsort(dim=1, descending=True, stable=True)
            ids = there.nonzero().flatten()[order]
            living = ids.shape[1]
            assert got.ids[:, :living].tolist() == ids.tolist() and (got.ids[:, living:] == -1).all()
            assert torch.equal(bits(got.scores[:, :living]), bits(scores.gather(1, ids)))
            assert (got.scores[:, living:] == -torch.inf).all()

            asked = torch.arange(-1, count)
            listed = score_candidates(self.queries, table, asked)
            assert (listed[:, 0] == -torch.inf).all()
            assert torch.equal(bits(listed[:, 1:]), bits(scores.masked_fill(~there, -torch.inf)))

            options = (None, "max", there, None, torch.tensor(1.0), "reference")
            plain = ops.log_partition(self.queries, *Serving(items, bias, scale), *options)
            assert torch.equal(bits(log_partition(self.queries, table)), bits(plain))
        self.check_what_it_says(there)
        self.check_names(there)

    def check_what_it_says(self, there):
        table, count = self.table, len(self.rows)
        assert len(table) == count and table.count() == int(there.sum())
        memory = table.memory()
        assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
        for name in ("factors", "bias", "row_scale", "text", "alive", "ids", "id_text"):
            part = getattr(table, name)
            assert part is None or memory[name] >= part.nbytes
        words = table.extra_repr()
        assert words.startswith(f"{count} x {self.r}, {str(self.dtype).removeprefix('torch.')}")
        assert ("removed" in words) == (table.alive is not None)
        assert table.factors.dtype == self.dtype and table.factors.requires_grad == self.trainable

    def check_names(self, there):
        table, places = self.table, torch.arange(len(self.rows))
        if self.names is None:
            assert table.to_external(places) is places and torch.equal(table.rows_of(places[there]), places[there])
            return
        wanted = [row.name for row in self.rows]
        named = table.to_external(places)
        assert named.tolist() == wanted
        assert table.to_external(torch.tensor([[-1]])).tolist() == [[None if self.names == "strings" else -1]]
        if there.any():
            assert torch.equal(table.rows_of(named[there.numpy() if self.names == "strings" else there]), places[there])
        present = {row.name for row in self.living()}
        absent = [row.name for row in self.rows if row.name not in present][:2]
        for name in [*absent, "never" if self.names == "strings" else 3]:
            with pytest.raises(ValueError, match="is not in the table"):
                table.rows_of([name] if self.names == "strings" else torch.tensor([name]))


TableMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


class TestStates(TableMachine.TestCase):
    pass
