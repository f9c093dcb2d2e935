// The fused quantizer step, and the residual one. Torch-free.
#pragma once
#include "nearest.h"

namespace vqfast {

struct StepOutputs {       // of one codebook; contiguous but for quantized
  Target quantized;        // [B, G, N, D] in x's type
  double* sq_error;        // [2] the same sum twice
  int64_t* indices;        // [B, G, N]
  float* sums;             // [G, K, D] or null
  int64_t* counts;         // [G, K]
  int64_t* nonfinite;      // []
};

// mask [B, N] or null.
void quantize(const View& x, const View& codebook, const bool* mask, Metric metric, const Hints* hints, const StepOutputs& out,
              const Parallel& parallel);

// codebooks [Q, G, K, D]; indices, sums and counts have a leading Q, sq_error is that of all levels together. pull [B, G, N, D] or
// null: the sum over levels of what each left over, 0 where a row does not count; with a factor, the gradient of the error into x.
void residual(const View& x, const View& codebooks, const bool* mask, Metric metric, const StepOutputs& out, float* pull,
              const Parallel& parallel);

}  // namespace vqfast
