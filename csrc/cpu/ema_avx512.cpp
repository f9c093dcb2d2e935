// The statistics' kernels of the avx512 level.
#include <immintrin.h>
#include <stdint.h>

#include "ema_level.h"

namespace {
#include "lanes_avx512.h"
inline void narrow(float* p, D a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
#include "ema_impl.h"
}  // namespace

const vqfast::EmaKernels& vqfast::ema_kernels_avx512() { return kKernels; }
