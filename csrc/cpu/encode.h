// Codes of a table's rows.
#pragma once

#include "kernels.h"
#include "views.h"

namespace urm {

struct EncodeRequest {
  MatrixView items;
  MatrixView row_scale;  // [1, items] or data == nullptr: the row is multiplied by it
  Rotation rotation;
  int bits = 4;            // of `blocks`
  char* blocks = nullptr;  // [rows / 32] of block_bytes
  char* fine = nullptr;    // [rows] of fine_row_bytes, or null
  int threads = 1;
  const Kernels* kernels = nullptr;
};

// All whole blocks of the items.
void encode_blocks(const EncodeRequest& request);

// Items 0, 1, ... are the new contents of these rows (ascending): their places in `blocks` and `fine` are written, of
// rows within the first `blocks_count` blocks.
void encode_rows(const EncodeRequest& request, const int64_t* rows, int64_t blocks_count);

}  // namespace urm
