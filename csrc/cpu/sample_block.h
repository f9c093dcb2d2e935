// The kernels of the sampler, written once over a vector type V and compiled once per SIMD level (sample_scalar.cpp, sample_avx2.cpp,
// sample_avx512.cpp). Everything lives in an anonymous namespace: no other file may pick up an inline function built for a wide target.
//
// V offers: N lanes; load, store, set1, add, sub, mul, div, fma, max, min (x86's rule: the second operand when either is NaN),
// shift_exponent(y, t) = y * 2^n for t = n + 1.5 * 2^23, and choose_positive(x, a, b) = x > 0 ? a : b, lane by lane.
#pragma once
#include "sample.h"

namespace {

using vqfast::kWeightPanel;

// Owns MR rows by NV vectors of one panel: MR * NV accumulators stay in registers while c runs over the channels.
template <class V, int MR, int NV>
inline void chain_tile(float* acc, const float* a, int64_t lda, const float* w, int64_t channels) {
  typename V::T sum[MR][NV];
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) sum[r][v] = V::load(acc + r * kWeightPanel + v * V::N);
  for (int64_t c = 0; c < channels; ++c) {
    typename V::T weight[NV];
    for (int v = 0; v < NV; ++v) weight[v] = V::load(w + c * kWeightPanel + v * V::N);
    // Sixteen rows ahead (4 KB): far enough for the second cache level, near enough not to leave the first.
    if (MR == 1)
      for (int v = 0; v < NV; v += 16 / V::N > 0 ? 16 / V::N : 1) __builtin_prefetch(w + (c + 16) * kWeightPanel + v * V::N);
    for (int r = 0; r < MR; ++r) {
      const typename V::T x = V::set1(a[r * lda + c]);
      for (int v = 0; v < NV; ++v) sum[r][v] = V::fma(x, weight[v], sum[r][v]);
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) V::store(acc + r * kWeightPanel + v * V::N, sum[r][v]);
}

template <class V, int NV>
void chain(float* acc, const float* a, int64_t lda, int64_t rows, const float* w, int64_t channels) {
  for (int64_t m = 0; m < rows; m += 6) {
    const int64_t left = rows - m;
    for (int64_t o = 0; o < kWeightPanel; o += NV * V::N) {
      float* out = acc + m * kWeightPanel + o;
      const float* in = a + m * lda;
      if (left >= 6) chain_tile<V, 6, NV>(out, in, lda, w + o, channels);
      else if (left == 5) chain_tile<V, 5, NV>(out, in, lda, w + o, channels);
      else if (left == 4) chain_tile<V, 4, NV>(out, in, lda, w + o, channels);
      else if (left == 3) chain_tile<V, 3, NV>(out, in, lda, w + o, channels);
      else if (left == 2) chain_tile<V, 2, NV>(out, in, lda, w + o, channels);
      else chain_tile<V, 1, NV>(out, in, lda, w + o, channels);
    }
  }
}

// exp(x) for x clipped to [-86, 88]: 2^n e^r with |r| <= ln(2) / 2, degree-7 polynomial (Cephes' coefficients), about 1 ulp.
template <class V>
inline typename V::T exp32(typename V::T x) {
  x = V::min(V::max(x, V::set1(-86.0f)), V::set1(88.0f));
  const auto t = V::fma(x, V::set1(1.44269504088896341f), V::set1(12582912.0f));  // 1.5 * 2^23 rounds to the nearest integer
  const auto n = V::sub(t, V::set1(12582912.0f));
  auto r = V::fma(n, V::set1(-0.693359375f), x);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  auto p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  p = V::fma(p, V::mul(r, r), r);
  return V::shift_exponent(V::add(p, V::set1(1.0f)), t);
}

// tanh(a) sigmoid(b) = (1 - e^-2a) / ((1 + e^-2a)(1 + e^-b)): one division. The clips keep the product finite and change
// tanh by less than 5e-9 and sigmoid by less than 1e-26.
template <class V>
inline typename V::T gate_one(typename V::T a, typename V::T b) {
  const auto one = V::set1(1.0f);
  const auto ea = exp32<V>(V::min(V::max(V::mul(a, V::set1(-2.0f)), V::set1(-20.0f)), V::set1(20.0f)));
  const auto eb = exp32<V>(V::min(V::max(V::mul(b, V::set1(-1.0f)), V::set1(-60.0f)), V::set1(60.0f)));
  return V::div(V::sub(one, ea), V::mul(V::add(one, ea), V::add(one, eb)));
}

template <class V>
inline typename V::T glu_one(typename V::T a, typename V::T b) {
  const auto eb = exp32<V>(V::min(V::max(V::mul(b, V::set1(-1.0f)), V::set1(-60.0f)), V::set1(60.0f)));
  return V::div(a, V::add(V::set1(1.0f), eb));
}

template <class V>
inline typename V::T elu_one(typename V::T a) {
  const auto below = V::sub(exp32<V>(V::min(a, V::set1(0.0f))), V::set1(1.0f));
  return V::choose_positive(a, a, below);
}

// Tails run through a padded copy, so every lane sees the same operations.
template <class V, class F>
inline void map2(float* out, const float* a, const float* b, int64_t n, F f) {
  int64_t i = 0;
  for (; i + V::N <= n; i += V::N) V::store(out + i, f(V::load(a + i), V::load(b + i)));
  if (i == n) return;
  float pa[V::N] = {}, pb[V::N] = {};
  for (int64_t j = i; j < n; ++j) pa[j - i] = a[j], pb[j - i] = b[j];
  V::store(pa, f(V::load(pa), V::load(pb)));
  for (int64_t j = i; j < n; ++j) out[j] = pa[j - i];
}

template <class V>
void gate(float* out, const float* a, const float* b, int64_t n) {
  map2<V>(out, a, b, n, gate_one<V>);
}

template <class V>
void glu(float* out, const float* a, const float* b, int64_t n) {
  map2<V>(out, a, b, n, glu_one<V>);
}

template <class V>
void elu(float* out, const float* a, int64_t n) {
  map2<V>(out, a, a, n, [](typename V::T x, typename V::T) { return elu_one<V>(x); });
}

template <class V>
void scores(float* out, const float* q, const float* keys, int64_t ldk, int64_t channels, int64_t count, float scale) {
  for (int64_t t = 0; t < count; t += 16)
    for (int64_t s = t; s < t + 16; s += V::N) {
      auto sum = V::set1(0.0f);
      for (int64_t c = 0; c < channels; ++c) sum = V::fma(V::set1(q[c]), V::load(keys + c * ldk + s), sum);
      V::store(out + s, V::mul(sum, V::set1(scale)));
    }
}

template <class V>
float softmax(float* x, float top, int64_t count) {
  float lanes[16] = {};
  for (int64_t t = 0; t < count; t += 16) {
    for (int64_t s = t; s < t + 16; s += V::N) V::store(x + s, exp32<V>(V::sub(V::load(x + s), V::set1(top))));
    for (int64_t s = count; s < t + 16; ++s) x[s] = 0.0f;
    for (int s = 0; s < 16; s += V::N) V::store(lanes + s, V::add(V::load(lanes + s), V::load(x + t + s)));
  }
  for (int half = 8; half > 0; half /= 2)
    for (int s = 0; s < half; ++s) lanes[s] = lanes[s] + lanes[s + half];
  return lanes[0];
}

template <class V>
void mix_values(float* out, const float* weights, const float* values, int64_t ldv, int64_t channels, int64_t count, float total) {
  for (int64_t o = 0; o < channels; o += V::N) {
    auto sum = V::set1(0.0f);
    for (int64_t t = 0; t < count; ++t) sum = V::fma(V::set1(weights[t]), V::load(values + t * ldv + o), sum);
    V::store(out + o, V::div(sum, V::set1(total)));
  }
}

template <class V, int NV>
constexpr vqfast::SampleKernels make_kernels() {
  return {chain<V, NV>, gate<V>, glu<V>, elu<V>, scores<V>, softmax<V>, mix_values<V>};
}

}  // namespace
