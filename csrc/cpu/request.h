// What every function of a table is asked.
#pragma once

#include "kernels.h"
#include "overlay.h"
#include "queries.h"
#include "views.h"

namespace urm {

struct Request {
  QueriesView queries;
  MatrixView items;
  MatrixView bias;       // [1, items] or data == nullptr
  MatrixView row_scale;  // likewise: a factor of the row's dots
  Overlay overlay;
  Reduce reduce = Reduce::kMax;
  int threads = 1;
  const Kernels* kernels = nullptr;
};

}  // namespace urm
