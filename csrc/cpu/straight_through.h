// The gradient of a quantizer step into its rows. Torch-free.
#pragma once
#include "view.h"

namespace vqfast {

// out = grad + factor (x - code), each operation rounded to float32 and the result to the target's type: 0 where an index is negative, and
// without the second part in rows where a difference is not finite. grad may be null. x, grad and out [B, G, N, D] have one type, in any
// layouts; out has no gaps. Codes are [1, G, K, D], taken by index, or rows like x.
enum class CodesAre { kCodebook, kRows };
void straight_through(const View& x, const View* grad, const View& codes, CodesAre codes_are, const int64_t* indices, float factor,
                      const Target& out, const Parallel& parallel);

}  // namespace vqfast
