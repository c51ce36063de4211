// All kernels, by the names that they are launched by: expressions, so that NVRTC knows them as well.
#pragma once

#include "cells.h"
#include "encode.h"
#include "scan_codes.h"
#include "second_way.h"

// clang-format off
#define URM_KERNELS(each)                                                                            \
  each(urm::encode_rows) each(urm::prepare_queries) each(urm::encode_queries) each(urm::sample_maxima) \
  each(urm::set_limits) each(urm::begin_second_way) each(urm::count_digits) each(urm::collect_unproven) \
  each(urm::score_rows) each(urm::select_keys) each(urm::set_promise) each(urm::score_promising) \
  each(urm::list_tiles) each(urm::mark_allowed)
#define URM_SCANS(each)                                                                              \
  each(urm::scan_codes<2, 0, false>) each(urm::scan_codes<2, 0, true>) each(urm::scan_codes<2, 2, false>) \
  each(urm::scan_codes<2, 2, true>) each(urm::scan_codes<2, 4, false>) each(urm::scan_codes<2, 4, true>)  \
  each(urm::scan_codes<4, 0, false>) each(urm::scan_codes<4, 0, true>) each(urm::scan_codes<4, 2, false>) \
  each(urm::scan_codes<4, 2, true>) each(urm::scan_codes<4, 4, false>) each(urm::scan_codes<4, 4, true>)  \
  each(urm::scan_codes<8, 0, false>) each(urm::scan_codes<8, 0, true>) each(urm::scan_codes<8, 2, false>) \
  each(urm::scan_codes<8, 2, true>) each(urm::scan_codes<8, 4, false>) each(urm::scan_codes<8, 4, true>) \
  each(urm::bound_cells<0, false>) each(urm::bound_cells<0, true>) each(urm::bound_cells<2, false>) \
  each(urm::bound_cells<2, true>) each(urm::bound_cells<4, false>) each(urm::bound_cells<4, true>)
// clang-format on
