// The contract's formula: what settles every answer. float64, ascending d, one rounding per operation, ties to the lowest index.
#pragma once

#include "cuda/nearest.h"

namespace vq {

__device__ __forceinline__ double score_term(int metric, double x, double c) {
  const double difference = sub(x, c);
  return metric == kL2 ? mul(difference, difference) : mul(x, c);
}

// What nearest minimises, from the sum of the terms and the code's norm.
__device__ __forceinline__ double score_of(int metric, double sum, double code_norm) {
  if (metric == kL2) return sum;
  if (metric == kDot) return -sum;
  return code_norm > 0 ? -div(sum, code_norm) : -0.0;
}

__device__ __forceinline__ float distance_of(int metric, double score, double row_square) {
  if (metric != kCosine) return float(score);
  return row_square > 0 ? float(add(1.0, div(score, sqrt_rn(row_square)))) : 1.0f;
}

struct Nearest {
  double score;
  int code;
  __device__ __forceinline__ void take(double other, int k) {
    if (other < score || (other == score && k < code)) score = other, code = k;
  }
};

__device__ inline double exact_score(const NearestProblem& p, i64 g, i64 x_base, i64 k, double code_norm) {
  const i64 c_base = p.codebook.base(g, k);
  double sum = 0;
  for (i64 d = 0; d < p.x.dim; ++d)
    sum = add(sum, score_term(p.metric, load_f32(p.x.data, p.x.dtype, x_base + d * p.x.stride_d),
                              load_f32(p.codebook.data, p.codebook.dtype, c_base + d * p.codebook.stride_d)));
  return score_of(p.metric, sum, code_norm);
}

}  // namespace vq
