// The sampler's kernels one lane at a time, for processors without AVX2: slow (the fused multiply-add is a library call), same bits.
#include <cmath>
#include <cstring>

#include "sample_block.h"

namespace {

struct V1 {
  using T = float;
  static constexpr int N = 1;
  static T load(const float* p) { return *p; }
  static void store(float* p, T x) { *p = x; }
  static T set1(float x) { return x; }
  static T add(T a, T b) { return a + b; }
  static T sub(T a, T b) { return a - b; }
  static T mul(T a, T b) { return a * b; }
  static T div(T a, T b) { return a / b; }
  static T fma(T a, T b, T c) { return std::fmaf(a, b, c); }
  static T max(T a, T b) { return a > b ? a : b; }
  static T min(T a, T b) { return a < b ? a : b; }
  static T shift_exponent(T y, T t) {
    uint32_t bits, shift;
    std::memcpy(&bits, &y, 4);
    std::memcpy(&shift, &t, 4);
    bits += shift << 23;
    std::memcpy(&y, &bits, 4);
    return y;
  }
  static T choose_positive(T x, T a, T b) { return x > 0.0f ? a : b; }
};

}  // namespace

namespace vqfast {
const SampleKernels& sample_kernels_scalar() {
  static constexpr SampleKernels kernels = make_kernels<V1, 8>();
  return kernels;
}
}  // namespace vqfast
