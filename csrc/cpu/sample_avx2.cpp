// The sampler's kernels with 8 lanes; 6 x 2 accumulators, 2 weights and 1 input fill 15 of the 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "sample_block.h"

namespace {

struct V8 {
  using T = __m256;
  static constexpr int N = 8;
  static T load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, T x) { _mm256_storeu_ps(p, x); }
  static T set1(float x) { return _mm256_set1_ps(x); }
  static T add(T a, T b) { return _mm256_add_ps(a, b); }
  static T sub(T a, T b) { return _mm256_sub_ps(a, b); }
  static T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static T div(T a, T b) { return _mm256_div_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static T max(T a, T b) { return _mm256_max_ps(a, b); }
  static T min(T a, T b) { return _mm256_min_ps(a, b); }
  static T shift_exponent(T y, T t) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
  }
  static T choose_positive(T x, T a, T b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
  }
};

}  // namespace

namespace vqfast {
const SampleKernels& sample_kernels_avx2() {
  static constexpr SampleKernels kernels = make_kernels<V8, 2>();
  return kernels;
}
}  // namespace vqfast
#endif
