// gather on CUDA: what the launcher takes. Torch-free.
#pragma once

#include "cuda/common.cuh"

namespace vq {

struct GatherProblem {
  Codes codebook;
  int element_bytes;
  Index indices;
  void* out;  // [B, G, N, D] contiguous, codebook's dtype
};

void gather(const GatherProblem& problem, cudaStream_t stream);

}  // namespace vq
