// Statistics per code and the moving-average update. Torch-free.
#pragma once
#include "view.h"

namespace vqfast {

enum class Stats {
  kDone,
  kOutOfRange,  // an index lies outside -1..codes-1; nothing is sure about sums and counts
  kNotFinite,   // a row with an index is not finite, and in the sums
};

// sums [codes, dim] (may be null) and counts [codes] of rows by index; index -1 is left out. Rows are grouped by a counting sort
// and summed in double, ascending, in blocks of fixed size whose parts are added in order: the same bits for any thread count.
Stats code_stats(const Rows& rows, const int64_t* index, int64_t codes, float* sums, int64_t* counts, const Parallel& parallel);

// One group of ema_update_; see vqfast/reference.py.
void ema_update(float* codebook, float* cluster_size, float* cluster_sum, const float* sums, const int64_t* counts,
                const bool* frozen, double decay, double eps, int64_t codes, int64_t dim, const Parallel& parallel);

}  // namespace vqfast
