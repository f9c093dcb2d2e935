// The statistics' kernels of the avx2 level.
#include <immintrin.h>
#include <stdint.h>

#include "ema_level.h"

namespace {
#include "lanes_avx2.h"
inline void narrow(float* p, D a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a)); }
#include "ema_impl.h"
}  // namespace

const vqfast::EmaKernels& vqfast::ema_kernels_avx2() { return kKernels; }
