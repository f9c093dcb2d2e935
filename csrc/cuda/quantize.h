// quantize on CUDA: what the launcher takes. Torch-free.
#pragma once

#include "cuda/ema.h"
#include "cuda/nearest.h"

namespace vq {

struct QuantizeProblem {
  NearestProblem search;  // its distance and indices are outputs of the search, made first
  void* quantized;        // [B, G, N, D] contiguous, x's dtype
  double* sq_error;       // [2], the same value twice
  i64* nonfinite;         // []
  float* sums;            // as StatsProblem
  i64* counts;
};

size_t quantize_space(const QuantizeProblem& problem);
void quantize(const QuantizeProblem& problem, void* memory, cudaStream_t stream);

}  // namespace vq
