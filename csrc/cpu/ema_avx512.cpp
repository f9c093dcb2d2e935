// sum_rows of the avx512 level.
#include <immintrin.h>
#include <stdint.h>

#include "ema_rows.h"

namespace {
#include "lanes_avx512.h"
inline void narrow(float* p, D a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
#include "ema_rows_impl.h"
}  // namespace

bool vqfast::sum_rows_avx512(const float* base, int64_t ld, const int64_t* at, int64_t n, int64_t known, int64_t dim, double* total,
                              float* sums) {
  return sum_rows_of(base, ld, at, n, known, dim, total, sums);
}
