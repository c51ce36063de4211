// The bound of codes.h for one row and one query, over any type of floats: 16 at a time on the CPU, one a lane on a
// GPU.
#pragma once

#include "codes.h"

namespace urm {

// What a row keeps beside its codes, widened.
template <class V>
struct CodedLengths {
  V scale, lost, norm;
};

// sum: of the products of codes, not below it. step, kept, lost: the query's b, g, f. error: code_error (g + f) of the
// user's longest queries; underflow: kCodeUnderflow.
template <class V>
URM_HOST_DEVICE V code_bound(V sum, V step, V kept, V lost, V error, V underflow, CodedLengths<V> row) {
  V bound = V::multiply(sum, step);
  bound = V::fma(kept, row.lost, bound);
  bound = V::fma(lost, row.norm, bound);
  bound = V::add(bound, V::multiply(error, row.norm));
  return V::fma(bound, row.scale, underflow);
}

}  // namespace urm
