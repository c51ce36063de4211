"""Survivors of a tile go to the end of their users' lists, int64 [B, capacity]; counts int32 [B], without a sign.

A list that is full keeps counting, so that whoever reads the count knows.
"""

import triton
import triton.language as tl

from .canonical import unsigned_counts

# Four scores at a time: one test of all, and a branch that is rarely taken. Operands, four of each: $0 an output that
# nobody reads, $4 scores, $8 limits, $12 rows, $16 users, $20 counts, $24 out, $28 capacity.
_APPEND_ONE = """
 setp.lt.f32 dead, ${score}, ${limit};
 setp.lt.or.s64 dead, ${row}, 0, dead;
 setp.lt.or.s32 dead, ${user}, 0, dead;
 @dead bra NEXT{n};
 mad.wide.s32 at, ${user}, 4, ${counts};
 atom.global.relaxed.gpu.add.u32 slot, [at], 1;
 cvt.u64.u32 at, slot;
 setp.ge.u64 dead, at, ${capacity};
 @dead bra NEXT{n};
 cvt.s64.s32 first, ${user};
 mad.lo.s64 at, first, ${capacity}, at;
 shl.b64 at, at, 3;
 add.s64 at, at, ${out};
 st.global.b64 [at], ${row};
NEXT{n}:"""
_PACK = tl.constexpr(4)
_APPEND = tl.constexpr(
    """{
 .reg .pred some, dead;
 .reg .b32 slot;
 .reg .b64 at, first;
 mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
 setp.geu.f32 some, $4, $8;
 setp.geu.or.f32 some, $5, $9, some;
 setp.geu.or.f32 some, $6, $10, some;
 setp.geu.or.f32 some, $7, $11, some;
 @!some bra DONE;"""
    + "".join(
        _APPEND_ONE.format(
            n=n, score=4 + n, limit=8 + n, row=12 + n, user=16 + n, counts=20 + n, out=24 + n, capacity=28 + n
        )
        for n in range(4)
    )
    + """
DONE:
}"""
)
_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 4 + ["f"] * 8 + ["l"] * 4 + ["r"] * 4 + ["l"] * 12))


@triton.jit
def append_sparse(scores, limits, rows, users, out, counts, capacity, BLOCK_N: tl.constexpr, USERS: tl.constexpr):
    """Appends every row whose score is not below the limit; about two instructions for a score that is.

    scores [BLOCK_N, USERS]; limits [USERS]; rows int64 [BLOCK_N] and users int32 [USERS], negative for what must not be
    appended. Every score has to be one thread's alone, as a tensor core's result is (test_compiled_kernels.py).
    """
    tl.inline_asm_elementwise(
        _APPEND,
        _CONSTRAINTS,
        [
            scores,
            tl.broadcast_to(limits[None, :], [BLOCK_N, USERS]),
            tl.broadcast_to(rows[:, None], [BLOCK_N, USERS]),
            tl.broadcast_to(users[None, :], [BLOCK_N, USERS]),
            counts.to(tl.int64),
            out.to(tl.int64),
            tl.full([], 0, tl.int64) + capacity,
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=_PACK,
    )


@triton.jit
def append(alive, rows, users, out, counts, capacity):
    """The same for what is alive (1 or 0) [BLOCK_N, USERS], a user at a time: for few users, or any layout.

    One atomic a user and tile, however many rows. Atomics for all pairs at once were slower: their results, which
    hardly anybody needs, are shared among the threads that hold copies.
    """
    NOBODY: tl.constexpr = 2**31 - 1
    some = tl.max(alive, 0) > 0
    user = tl.min(tl.where(some, users, NOBODY), 0)
    while user < NOBODY:
        own = tl.sum(tl.where(users[None, :] == user, alive, 0), 1)
        first = unsigned_counts(tl.atomic_add(counts + user, tl.sum(own, 0), sem="relaxed"))
        slot = first + tl.cumsum(own, 0) - own
        into = out + (user + tl.zeros([1], tl.int64)) * capacity
        tl.store(into + slot, rows, mask=(own > 0) & (slot < capacity))
        user = tl.min(tl.where(some & (users > user), users, NOBODY), 0)
