// The fused quantizer step, and the residual one. Torch-free.
#pragma once
#include "nearest.h"

namespace vqfast {

struct StepOutputs {       // of one codebook; canonical layout, contiguous
  void* quantized;         // [B, G, N, D] in x's type
  double* sq_error;        // [2] the same sum twice
  int64_t* indices;        // [B, G, N]
  float* sums;             // [G, K, D] or null
  int64_t* counts;         // [G, K]
  int64_t* nonfinite;      // []
};

// mask [B, N] or null.
void quantize(const View& x, const View& codebook, const bool* mask, Metric metric, const Hints* hints, const StepOutputs& out,
              const Parallel& parallel);

// codebooks [Q, G, K, D]; every output but quantized and nonfinite has a leading Q. rows [Q, B, G, N, D] in the codebooks' type, or
// null: the codes that each level chose (0 where masked).
void residual(const View& x, const View& codebooks, const bool* mask, Metric metric, const StepOutputs& out, void* rows,
              const Parallel& parallel);

}  // namespace vqfast
