// Nearest codes of few rows: the codebook is read once, as it lies, and nothing is prepared from it. Torch-free.
#pragma once
#include "codes.h"

namespace vqfast {

// Whether a search of this size is one for few rows. kIfSpread: where no few directions hold most of the codes' variance, so that the
// pruned road, which looks for them, would look in vain.
enum class Few { kNo, kIfSpread, kYes };
Few few_rows(int64_t rows, int64_t codes, int64_t dim);

// score [rows.count] and index [rows.count] as NearestSearch::run gives them. Returns how many candidates were settled, or -1: the data
// is not for this road (few directions where that counts, sizes that ask for scaling, too many codes equally near, a wild row), and the
// results mean nothing.
int64_t search_few(const ExactCodes& codes, int64_t codes_count, const Rows& rows, Few few, const Parallel& parallel, double* score,
                   int64_t* index);

}  // namespace vqfast
