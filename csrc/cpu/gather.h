// Rows of codes by index. Torch-free.
#pragma once
#include "view.h"

namespace vqfast {

// out [B, G, N, D] contiguous, elements of `bytes` bytes; codebook [1, G, K, D] any strides; index -1 gives zeros.
// Returns false, with nothing read out of bounds, when an index lies outside -1..K-1.
bool gather(const View& codebook, int64_t bytes, const int64_t* indices, int64_t batches, int64_t per_batch, void* out,
            const Parallel& parallel);

}  // namespace vqfast
