// Code statistics and the moving-average update on CUDA: what the launchers take. Torch-free.
#pragma once

#include "cuda/common.cuh"

namespace vq {

struct StatsProblem {
  Rows x;
  Index indices;
  const float* distance;  // [B, G, N] contiguous, NaN marks rows that are left out; or nullptr: x itself is looked at
  i64 size;               // K
  float* sums;            // [G, K, D]; nullptr: only counts are wanted
  i64* counts;            // [G, K]
};

size_t stats_space(const StatsProblem& problem);
void code_stats(const StatsProblem& problem, void* memory, cudaStream_t stream);

struct EmaProblem {
  i64 groups, size, dim;
  void *codebook, *cluster_size, *cluster_sum;  // contiguous, updated in place
  int codebook_dtype, size_dtype, sum_dtype;
  const void* sums;  // [G, K, D] contiguous
  int sums_dtype;
  const i64* counts;            // [G, K] contiguous
  const unsigned char* frozen;  // [G, K] contiguous bool, or nullptr
  int* any_row;                 // [G] scratch: whether a row of the group was counted
  double decay, eps;
};

void ema_update(const EmaProblem& problem, cudaStream_t stream);

}  // namespace vq
