// The statistics' kernels of the scalar level.
#include <stdint.h>

#include "ema_level.h"

namespace {
#include "lanes_scalar.h"
inline void narrow(float* p, D a) {
  for (int i = 0; i < WD; ++i) p[i] = (float)a[i];
}
#include "ema_impl.h"
}  // namespace

const vqfast::EmaKernels& vqfast::ema_kernels_scalar() { return kKernels; }
