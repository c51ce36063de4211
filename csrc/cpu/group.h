// What the threads that scan the table for one group of users share.
#pragma once

#include <atomic>
#include <cstdint>

#include "aligned.h"
#include "kernels.h"
#include "queries.h"
#include "scan.h"

namespace urm {

// Up to so many queries rows are read as they lie; above by transposed panels, or bounded first, since only then
// staging a row pays.
constexpr int64_t kDirectQueries = 8;

// A run of users whose cheap scores of a panel are formed, and used while they are in the first-level cache.
struct Slice {
  int64_t first_user, last_user;
  int64_t first_query, queries;
  int64_t offset;  // of the packed queries, in bytes
};

// The group's side of a cheap score; `score` is null where every row is scored exactly.
struct GroupBounds {
  const CheapScore* score = nullptr;
  DType rows = DType::kFloat32;  // as panels are staged from: bfloat16 where the table is read as it lies
  AlignedVector<char> queries{};
  AlignedVector<float> slack{};  // [total]
  AlignedVector<Slice> slices{};
  int64_t widest = 0;  // queries of a slice, rounded up
};

GroupBounds make_bounds(const ScanRequest& request, const PackedQueries& packed, int64_t users, int64_t padded);

struct Group {
  const ScanRequest& request;
  int64_t first_user, users, padded;
  PackedQueries packed;
  AlignedVector<float> panel{};  // packed queries for the panel kernel; empty where rows are read as they lie
  GroupBounds bounds{};
  bool guess = false;                  // thresholds, as the scan goes on
  QueryCodes query_codes{};            // empty where the table's codes are of no use, or it has none
  bool permuted = false;               // rows are met in the order of their codes, or of a list
  AlignedVector<float> cell_bounds{};  // [cells][users]; empty where cells are not asked
  AlignedVector<int64_t> replaced{};   // places of rows that have been, ascending: their codes may be changing
  // [users], where bounds are probable: what these have to reach, whatever is found meanwhile. The rows that do are
  // the same for any order and number of threads.
  AlignedVector<float> least{};
  int threads = 1;
  int64_t chunk_rows = 0;  // handed out at a time
  int64_t chunks = 0;
  int64_t chunk_step = 1;  // a chunk follows that many behind the one before, around the end
  std::atomic<int64_t> next_chunk{0}, done_chunks{0};
  std::atomic<bool> stop{false};
  std::atomic<int64_t> bytes{0}, survivors{0}, scored{0}, cells{0}, left_out{0};  // see ScanCounts

  // Users [first, last).
  Group(const ScanRequest& request, int64_t first, int64_t last, int64_t padded);

  bool direct() const { return panel.empty(); }

  // Rows are met by their *places*: their numbers, unless codes lie in another order or some rows are listed. Rows
  // without codes keep theirs.
  int64_t places() const { return request.rows_met(); }
  int64_t row_at(int64_t place) const {
    if (!permuted) return place;
    if (request.listed) return (*request.listed)[place];
    return place < request.codes.rows() ? request.codes.row_at(place) : place;
  }
  int64_t place_of(int64_t row) const {
    return permuted && row < request.codes.rows() ? request.codes.place_of(row) : row;
  }

  // Threads that pay for so many multiply-adds of codes, of those of the group.
  int threads_for(double multiply_adds) const;

  // The first place from `place` on whose row has been replaced; behind all rows where there is none.
  int64_t next_replaced(int64_t place) const;

  // Of blocks first, first + step, ..., `count` of them: the set of those that may hold a row that the user's mask
  // allows.
  uint32_t allowed_blocks(int64_t user, int64_t first, int64_t step, int64_t count) const;

  // Those lanes (bit i: place + i) whose rows the user may be given.
  uint32_t allowed(int64_t user, int64_t place, uint32_t lanes) const;

  void count(const ScanCounts& counts) {
    bytes.fetch_add(counts.bytes, std::memory_order_relaxed);
    survivors.fetch_add(counts.survivors, std::memory_order_relaxed);
    scored.fetch_add(counts.scored, std::memory_order_relaxed);
    cells.fetch_add(counts.cells, std::memory_order_relaxed);
    left_out.fetch_add(counts.left_out, std::memory_order_relaxed);
  }

  // The first row of the turn-th chunk, -1 behind the last.
  int64_t chunk_begin(int64_t turn) const { return turn < chunks ? turn * chunk_step % chunks * chunk_rows : -1; }
};

// Columns of a row in the kernels' memory.
int64_t padded_columns(const QueriesView& queries);

// Users whose packed queries stay in the second-level cache.
int64_t users_of_group(const QueriesView& queries);

}  // namespace urm
