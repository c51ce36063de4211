// The gradient of log_partition, by forming every dot again.
#pragma once

#include "scan.h"

namespace urm {

struct PartitionGradientRequest : ScanRequest {
  float temperature = 1;
  const float* logarithms = nullptr;   // [users], the partition's
  const float* grad = nullptr;         // [users], of the logarithms
  float* grad_queries = nullptr;       // [users, queries, r], of the queries as they were given
  float* grad_items = nullptr;         // [items, r] or null
  float* grad_bias = nullptr;          // [items] or null
  double* grad_temperature = nullptr;  // one number
};

// A row's part in a user's sum is p = exp(score / temperature - logarithm); d logarithm / d score = p / temperature.
// The result does not depend on the number of threads. Users whose logarithm is not finite have none. False when
// interrupted.
bool partition_gradient(const PartitionGradientRequest& request);

}  // namespace urm
