// The bound behind every screen, and what all of them share.
//
// The screens compare lower bounds of scores, so every number that goes into one is rounded to the safe side.
#pragma once

#include "cuda/nearest.h"

namespace vq {

enum CodeState : unsigned char {
  kScreened = 0,
  kNever = 1,  // not finite, or equal to a code of lower index: never the answer
  kWild = 2,   // so long that float32 squares could overflow: compared in float64 only
};

constexpr float kInfinity = __builtin_huge_valf();
constexpr double kWildLength = 4611686018427387904.0;  // 2^62: squares and their sums stay below 2^125
constexpr float kTameRow = 1152921504606846976.0f;     // 2^60

// The bound of the screen (float32, products of D terms). With X = x - m, U = c - m for the centre m, u = 2^-24, and x^, u^, w^
// the float32 values that the screen reads, the chain  s = fma(x^_d, -u^_d, s), from s = w^ ~ |u^|^2 / 2, has
//     |s - (|U|^2 / 2 - X.U)| <= e0 (|U|^2 / 2 + |X||U|),   e0 = 1.02 u (D + 5):
// D roundings of partial sums that are each at most the sum of all magnitudes, gamma_D <= 1.01 D u for D <= 2^17; one rounding
// of w^; one of each component of x^ and u^, relative to X and U since a float32 difference is rounded once; one for adding the
// bound itself; and one in reserve for norms that are themselves rounded up. The same holds for dot (w = 0, X = x), and for
// cosine with codes of length 1.
inline double screen_bound(i64 dim) { return 1.02 * double(dim + 5) / 16777216.0; }
constexpr i64 kScreenedDim = 131072;

// The float64 settling formula errs too: by (D + 3) 2^-53 of |x - c|^2 <= (|X| + |U|)^2 (l2), or of |x||c| (dot, cosine). The
// shares that hold |U| are lost in e0's reserve (l2) or in `length` (dot: |m| 2^-28, cosine: 2^-27); the share of |X|^2 is this,
// for both sides of a comparison, in scores of half size. The last term covers underflow: D roundings of 2^-150.
__device__ inline double screen_slack(int metric, i64 dim, double row_length) {
  const double tiny = double(dim + 8) * 0x1p-146;
  return tiny + (metric == kL2 ? 1.02 * double(dim + 4) * 0x1p-52 * row_length * row_length : 0.0);
}

// ---- float16 images of vectors ----------------------------------------------------------------------------------------------------

// 2^e brings a positive length into [16, 32); kept where 2^(2 e) fits a float.
__device__ __forceinline__ int scale_exponent(float length) {
  const int exponent = int(bits_of(length) >> 23) - 127;
  const int e = 4 - exponent;
  return length == 0 || e > 60 ? 60 : e < -60 ? -60 : e;
}
__device__ __forceinline__ double power_of_two(int e) { return ldexp(1.0, e); }

// Rounds to float16 and tells what is left.
__device__ __forceinline__ uint16_t half_of(double value, double* residual) {
  const uint16_t bits = f32_to_f16(float(value));
  *residual = value - double(f16_to_f32(bits));
  return bits;
}

// The tensor core adds 16 products and the accumulator after aligning them to the largest, and cuts: by how much `steps` such sums
// may be off, relative to the sum of all magnitudes. 18 units of 2^-23 a step is what no GPU has confirmed yet.
__host__ __device__ inline double tensor_core_bound(i64 steps) { return double(steps) * 18 * 0x1p-23; }

// ---- what a screen keeps of a row ---------------------------------------------------------------------------------------------------

struct Top {  // the smallest bound, its code, and the second smallest
  float best, second;
  int code;
  __device__ __forceinline__ void take(float bound, int k) {
    if (bound < best) {
      second = best, best = bound, code = k;
    } else if (bound < second) {
      second = bound;
    }
  }
  __device__ __forceinline__ void merge(float other_best, float other_second, int other_code) {
    if (other_best < best || (other_best == best && other_code < code)) {
      second = best < other_second ? best : other_second;
      best = other_best, code = other_code;
    } else {
      second = other_best < second ? other_best : second;
    }
  }
};

}  // namespace vq
