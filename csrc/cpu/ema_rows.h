// What one SIMD level does for the statistics per code. Torch-free.
#pragma once
#include <stdint.h>

namespace vqfast {

// The sum over i in [0, n) of rows base + at[i] * ld, in double, ascending in i: the same bits at every level. It goes to `total`, or
// where that is null, rounded, to `sums`; [dim] both. at[0, known) may be read, n <= known: what follows n is fetched ahead.
// False when a sum is not finite: doubles take any number of finite floats, so then a row was not.
using SumRows = bool (*)(const float* base, int64_t ld, const int64_t* at, int64_t n, int64_t known, int64_t dim, double* total,
                         float* sums);

bool sum_rows_scalar(const float*, int64_t, const int64_t*, int64_t, int64_t, int64_t, double*, float*);
bool sum_rows_avx2(const float*, int64_t, const int64_t*, int64_t, int64_t, int64_t, double*, float*);
bool sum_rows_avx512(const float*, int64_t, const int64_t*, int64_t, int64_t, int64_t, double*, float*);

}  // namespace vqfast
