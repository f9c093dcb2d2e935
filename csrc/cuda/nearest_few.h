// What the search for few rows keeps in device memory, and what a block of its screen says of a row.
#pragma once

#include "cuda/bounds.cuh"

namespace vq {

constexpr int kFewRows = 128, kFewCodes = 256;  // a block's tile: one wave of blocks covers 1,024 rows x 4,096 codes
constexpr int kFewDim = 2048;                   // a block holds the centre
constexpr int kNoCode = 0x7FFFFFFF;
// l2: a code longer than kWildLength scores at least 2^62 (2^61 - 2^60) with a row of at most kTameRow.
constexpr float kWildScore = 0x1p121f;

struct alignas(16) CodeBound {
  float half_norm;  // |U|^2 / 2, less the bound's share (l2), or 0; +inf: never the answer; too long for float32: kWildScore (l2), -inf (dot)
  float scale;      // from the float16 image back to U
  float length;     // upper bound of |U|
  float residual;   // upper bound of |U - image|
};

struct alignas(16) RowBound {
  float scale;
  float by_length, by_residual;  // E = by_length |U| + by_residual |U - image|
  float length;                  // upper bound of |X|; NaN: not finite, -1: masked, inf: too long, every code is evaluated
};

__device__ __forceinline__ float lower_bound(const RowBound& row, const CodeBound& code, float product) {
  const float score = fma(-product, row.scale * code.scale, code.half_norm);
  return sub(score, fma(row.by_length, code.length, row.by_residual * code.residual));
}

// The two smallest lower bounds of a set of codes, and one for all others. next == kNoCode: the second's code is not known.
struct Near {
  float best = kInfinity, second = kInfinity, third = kInfinity;
  int code = kNoCode, next = kNoCode;

  Near() = default;
  __device__ explicit Near(const Top& top) : best(top.best), second(top.second), third(top.second), code(top.code) {}

  __device__ __forceinline__ void merge(const Near& other) {
    const bool swapped = other.best < best || (other.best == best && other.code < code);
    const Near first = swapped ? other : *this, last = swapped ? *this : other;
    *this = first;
    if (last.best < first.second) {
      second = last.best, next = last.code;
      third = first.second < last.second ? first.second : last.second;
    } else if (last.best < first.third) {
      third = last.best;
    }
  }
  __device__ __forceinline__ Near shuffled(int step) const {
    Near other;
    other.best = shfl_xor(kFullWarp, best, step), other.second = shfl_xor(kFullWarp, second, step), other.third = shfl_xor(kFullWarp, third, step);
    other.code = shfl_xor(kFullWarp, code, step), other.next = shfl_xor(kFullWarp, next, step);
    return other;
  }
  // Whether a code that is not named here may have an L of at most `limit`.
  __device__ __forceinline__ bool hides_codes_up_to(float limit) const {
    const float hidden = next == kNoCode ? second : third;
    return hidden < kInfinity && hidden <= limit;
  }
};

struct FewSpace {
  u32* codes;       // [G, code tiles, padded D / 32, 256 codes x 16] pairs of float16, as mma's registers hold them
  u32* rows;        // [G, row tiles, padded D / 32, 128 rows x 16]
  CodeBound* code;  // [G, K]
  RowBound* row;    // [G, R]
  Near* near;       // [code tiles, G, R]
  float* limit;     // [G, R] what a winner's L may be
  i64 code_tiles, row_tiles, padded_dim;

  __host__ __device__ i64 tile_words(int vectors) const { return padded_dim / 2 * vectors; }
};

// Whether this problem is one for the search for few rows, and bytes and launches of it.
bool few_rows(const NearestProblem& problem);
size_t few_layout(const NearestProblem& problem, void* memory, FewSpace* space);
void nearest_few(const NearestProblem& problem, void* memory, cudaStream_t stream);

}  // namespace vq
