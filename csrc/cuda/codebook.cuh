// What every search does first: makes float32 codes for the screen, with bounds that hold for them. One warp owns one code.
//
// The screen compares lower bounds of scores, so every number made here is rounded to the safe side.
#pragma once

#include "cuda/bounds.cuh"

namespace vq {

constexpr int kCodeWarps = 8;       // codes per block
constexpr int kSampledGroups = 15;  // the centre is a median of this many means,
constexpr int kSampleSize = 32;     // each of at most so many codes: a third of the sample may be junk
__global__ void nearest_clear_kernel(NearestSpace space, i64 groups) {
  const i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < groups * space.buckets) space.bucket[i] = 0x7FFFFFFF;
  if (i >= groups) return;
  space.first_code[i] = 0x7FFFFFFF, space.wild_codes[i] = 0, space.open[i] = 0;
  if (space.steps) space.longest[i] = 0, space.code_residual[i] = 0;
}

// sqrt(sum c^2) as the contract computes it: d ascends, every operation rounded once. All lanes return it.
__device__ inline double code_norm_of(const Codes& c, i64 base, double (&square)[32]) {
  const int lane = threadIdx.x % 32;
  double sum = 0;
  for (i64 start = 0; start < c.dim; start += 32) {
    const i64 d = start + lane;
    const double value = d < c.dim ? load_f64(c.data, c.dtype, base + d * c.stride_d) : 0.0;
    square[lane] = mul(value, value);
    sync_warp();
    for (int i = 0; i < 32; ++i) sum = add(sum, square[i]);  // adding the zeros past D changes nothing: the sum is never -0
    sync_warp();
  }
  return sqrt_rn(sum);
}

// The same for equal codes (0 and -0 are equal). One warp, all lanes return it.
__device__ inline u32 code_hash(const Codes& c, i64 base) {
  u32 hash = 0;
  for (i64 d = threadIdx.x % 32; d < c.dim; d += 32) {
    const float value = load_f32(c.data, c.dtype, base + d * c.stride_d);
    u32 mixed = (value == 0 ? 0u : bits_of(value)) + u32(d) * 0x9E3779B9u;
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6Bu;
    hash += (mixed ^ mixed >> 13) * 0xC2B2AE35u;
  }
  hash = warp_sum(hash);
  return hash ^ hash >> 15;
}

struct Squares {
  double of[kCodeWarps][32];
};

// Which codes are finite, which is the first of its hash, and cosine norms.
__global__ void __launch_bounds__(32 * kCodeWarps) nearest_codes_kernel(Codes c, int metric, NearestSpace space) {
  VQ_SHARED(Squares, squares);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const i64 k = i64(blockIdx.x) * kCodeWarps + warp, g = blockIdx.y;
  if (k >= c.size) return;
  const i64 base = c.base(g, k);
  bool finite = true;
  for (i64 d = lane; d < c.dim; d += 32) finite = finite && is_finite(load_f32(c.data, c.dtype, base + d * c.stride_d));
  finite = ballot(kFullWarp, !finite) == 0;
  const u32 hash = code_hash(c, base);
  const double norm = metric == kCosine ? code_norm_of(c, base, squares.of[warp]) : 1.0;
  if (lane != 0) return;
  space.state[g * c.size + k] = finite ? kScreened : kNever;
  if (metric == kCosine) space.code_norm[g * c.size + k] = norm;
  if (!finite) return;
  atomic_min(&space.first_code[g], int(k));
  atomic_min(&space.bucket[g * space.buckets + i64(hash & u32(space.buckets - 1))], int(k));
}

struct Means {
  float of[kSampledGroups][33];
};

// centre[d]: the median of a few means of a few codes each, so that a code of huge norm does not move it. 32 components a block.
__global__ void __launch_bounds__(32 * kSampledGroups) nearest_centre_kernel(Codes c, int metric, NearestSpace space) {
  VQ_SHARED(Means, means);
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const i64 d = i64(blockIdx.x) * 32 + lane, g = blockIdx.y;
  const int groups = c.size < kSampledGroups ? int(c.size - (c.size % 2 == 0)) : kSampledGroups;
  const i64 wanted = i64(groups) * kSampleSize, samples = c.size < wanted ? c.size : wanted;
  double sum = 0;
  int count = 0;
  if (d < c.dim && group < groups) {
    for (i64 i = group; i < samples; i += groups) {
      const i64 k = i * c.size / samples;
      double value = load_f64(c.data, c.dtype, c.base(g, k) + d * c.stride_d);
      if (metric == kCosine) {
        const double norm = space.code_norm[g * c.size + k];
        value = norm > 0 ? value / norm : 0.0;
      }
      if (is_finite(value)) sum += value, ++count;
    }
  }
  const float mean = count ? float(sum / count) : 0.0f;
  means.of[group][lane] = is_finite(mean) ? mean : 0.0f;
  sync_threads();
  if (d >= c.dim || group >= groups) return;
  const float mine = means.of[group][lane];
  int rank = 0;
  for (int i = 0; i < groups; ++i) {
    const float other = means.of[i][lane];
    rank += other < mine || (other == mine && i < group);
  }
  if (rank == groups / 2) space.centre[g * c.dim + d] = mine;
}

// The screen's codes: centred, rounded, with upper bounds of their lengths; and the final state of each code.
__global__ void __launch_bounds__(32 * kCodeWarps) nearest_pack_kernel(Codes c, int metric, double e0, NearestSpace space) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const i64 k = i64(blockIdx.x) * kCodeWarps + warp, g = blockIdx.y, at = g * c.size + k;
  if (k >= c.size) return;
  const i64 base = c.base(g, k);
  float* out = space.codes + (g * ceil_div(c.size, kTile) + k / kTile) * space.padded_dim * kTile + k % kTile;
  const float* centre = space.centre + g * c.dim;
  const bool finite = space.state[at] == kScreened;
  const double norm = metric == kCosine ? space.code_norm[at] : 1.0;
  double square = 0, centre_square = 0;
  for (i64 d = lane; finite && d < c.dim; d += 32) {
    const float m = centre[d], value = load_f32(c.data, c.dtype, base + d * c.stride_d);
    const float u = metric == kCosine ? float((norm > 0 ? double(value) / norm : 0.0) - double(m)) : sub(value, m);
    out[d * kTile] = u;
    square += double(u) * double(u);
    centre_square += double(m) * double(m);
  }
  square = warp_sum(square), centre_square = warp_sum(centre_square);

  // A code that equals the first one of its hash bucket can never win a tie.
  bool duplicate = false;
  if (finite) {
    const i64 first = space.bucket[g * space.buckets + i64(code_hash(c, base) & u32(space.buckets - 1))];
    bool equal = first < k;
    for (i64 d = lane; equal && d < c.dim; d += 32)
      equal = load_f32(c.data, c.dtype, base + d * c.stride_d) == load_f32(c.data, c.dtype, c.base(g, first) + d * c.stride_d);
    duplicate = ballot(kFullWarp, !equal) == 0;
  }

  const double grown = 1.0 + 0x1p-34;  // covers the rounding of these float64 sums for D <= 2^17
  const double extra = metric == kCosine ? 0x1p-27 : metric == kDot ? 0x1p-28 * sqrt(centre_square) * grown : 0.0;
  const double length = sqrt(square) * grown + extra;
  const bool wild = !(length <= kWildLength);
  const CodeState state = !finite || duplicate ? kNever : wild ? kWild : kScreened;
  for (i64 d = lane; d < space.padded_dim; d += 32)
    if (d >= c.dim || state != kScreened) out[d * kTile] = 0.0f;
  if (lane != 0) return;
  space.state[at] = state;
  space.length[at] = state == kScreened ? round_up(length) : 0.0f;
  space.half_norm[at] = state != kScreened ? float_of(0x7F800000u) : metric == kL2 ? round_down(square / 2 * (1.0 - e0)) : 0.0f;
  if (state == kWild) atomic_add(&space.wild_codes[g], 1);
  if (state == kScreened && space.steps) atomic_max(&space.longest[g], int(bits_of(round_up(length))));  // positive floats order as integers
}

}  // namespace vq
