// sum_rows of the scalar level.
#include <stdint.h>

#include "ema_rows.h"

namespace {
#include "lanes_scalar.h"
inline void narrow(float* p, D a) {
  for (int i = 0; i < WD; ++i) p[i] = (float)a[i];
}
#include "ema_rows_impl.h"
}  // namespace

bool vqfast::sum_rows_scalar(const float* base, int64_t ld, const int64_t* at, int64_t n, int64_t known, int64_t dim, double* total,
                              float* sums) {
  return sum_rows_of(base, ld, at, n, known, dim, total, sums);
}
