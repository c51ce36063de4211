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
  int threads = 1;
  int64_t chunk_rows = 0;  // handed out at a time
  std::atomic<int64_t> next_chunk{0};
  std::atomic<bool> stop{false};

  // Users [first, last).
  Group(const ScanRequest& request, int64_t first, int64_t last, int64_t padded);

  bool direct() const { return panel.empty(); }
};

// Columns of a row in the kernels' memory.
int64_t padded_columns(const QueriesView& queries);

// Users whose packed queries stay in the second-level cache.
int64_t users_of_group(const QueriesView& queries);

}  // namespace urm
