// What a caller may remember of a codebook and pass to later searches as Hints. Torch-free.
#pragma once
#include "search.h"
#include "view.h"

namespace vqfast {

// How many principal directions a codebook of `dim` dimensions is remembered by.
int64_t hint_directions(int64_t dim);

// order [G, K]: the codes as the pruned road would put them, ascending where it would not; basis [G, hint_directions(D), D],
// zeros where D is more than that road takes.
void find_hints(const View& codebook, Metric metric, int64_t* order, float* basis, const Parallel& parallel);

}  // namespace vqfast
