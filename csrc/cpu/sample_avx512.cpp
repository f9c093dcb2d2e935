// The sampler's kernels with 16 lanes; 6 x 4 accumulators, 4 weights and 1 input fill 29 of the 32 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "sample_block.h"

namespace {

struct V16 {
  using T = __m512;
  static constexpr int N = 16;
  static T load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, T x) { _mm512_storeu_ps(p, x); }
  static T set1(float x) { return _mm512_set1_ps(x); }
  static T add(T a, T b) { return _mm512_add_ps(a, b); }
  static T sub(T a, T b) { return _mm512_sub_ps(a, b); }
  static T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static T div(T a, T b) { return _mm512_div_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static T max(T a, T b) { return _mm512_max_ps(a, b); }
  static T min(T a, T b) { return _mm512_min_ps(a, b); }
  static T shift_exponent(T y, T t) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
  }
  static T choose_positive(T x, T a, T b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), b, a);
  }
};

}  // namespace

namespace vqfast {
const SampleKernels& sample_kernels_avx512() {
  static constexpr SampleKernels kernels = make_kernels<V16, 4>();
  return kernels;
}
}  // namespace vqfast
#endif
