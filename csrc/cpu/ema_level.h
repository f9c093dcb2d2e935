// What one SIMD level does for the statistics per code and the moving averages. Torch-free.
#pragma once
#include <stdint.h>

namespace vqfast {

struct EmaKernels {
  // The sum over i in [0, n) of rows base + at[i] * ld, in double, ascending in i: the same bits at every level. It goes to `total`, or
  // where that is null, rounded, to `sums`; [dim] both. at[0, known) may be read, n <= known: what follows n is fetched ahead.
  // False when a sum is not finite: doubles take any number of finite floats, so then a row was not.
  bool (*sum_rows)(const float* base, int64_t ld, const int64_t* at, int64_t n, int64_t known, int64_t dim, double* total,
                   float* sums);
  // out = total * keep + sums * take, and out = total / size, each operation rounded; [dim]. False when a result is not finite.
  bool (*blend)(const float* total, const float* sums, float* out, float keep, float take, int64_t dim);
  bool (*divide)(const float* total, float* out, float size, int64_t dim);
};

const EmaKernels& ema_kernels();  // of the level in use
const EmaKernels& ema_kernels_scalar();
const EmaKernels& ema_kernels_avx2();
const EmaKernels& ema_kernels_avx512();

}  // namespace vqfast
