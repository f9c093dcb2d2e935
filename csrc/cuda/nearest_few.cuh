// nearest for few rows, where launches and latency count for more than arithmetic: three kernels, l2 and dot.
//
//     codes, rows --> prepare: float16 images, measured bounds --> screen: mma, a block owns 128 rows x 256 codes
//                                                              --> settle: a warp owns a row, float64 for every code in reach
//
// As in every screen, a score's lower bound is L <= score <= L + 2 E; E comes from the residual norms of the float16 images,
//     |X U - xh uh| <= |X - xh||U| + |xh||U - uh|  (Cauchy-Schwarz),
// from the tensor core's additions and from e0 (bounds.cuh). A block leaves, per row, its two smallest L with their codes and a
// lower bound of its other 254. Settling evaluates the codes whose L does not lie above the smallest upper bound; where a third
// may be in reach, all 256. So nothing is left over, and the codes are split over as many blocks as there are tiles.
//
// The centre is, per component, the median of three codes, which every block finds for itself: it takes a common offset away,
// and one wild code cannot move it.
#pragma once

#include "cuda/exact.cuh"
#include "cuda/nearest_few.h"

namespace vq {

// ---- prepare: a warp owns a code or a row -------------------------------------------------------------------------------------

constexpr int kFewWarps = 8;

struct Sample {  // three codes, of which the centre is made
  i64 code[3];
  __device__ explicit Sample(i64 size) : code{0, size / 2, size - 1} {}
  __device__ __forceinline__ float value(const Codes& c, i64 g, int i, i64 d) const {
    return load_f32(c.data, c.dtype, c.base(g, code[i]) + d * c.stride_d);
  }
  __device__ __forceinline__ float centre(const Codes& c, i64 g, i64 d) const {
    const float a = value(c, g, 0, d), b = value(c, g, 1, d), e = value(c, g, 2, d);
    const float median = fmaxf(fminf(a, b), fminf(fmaxf(a, b), e));
    return is_finite(median) ? median : 0.0f;  // any value is right, if both sides use it
  }
};

struct FewCentre {
  float of[kFewDim];
};

// Writes one vector's float16 image, pair by pair, where `put(pair, bits)` says; value(d) is exact in float32. Returns the upper
// bounds of the image's residual norm and of its own norm, in value's units.
struct ImageNorms {
  float residual, own;
};
template <class Value, class Put>
__device__ __forceinline__ ImageNorms few_image(i64 dim, i64 padded, int exponent, Value value, Put put) {
  const double scale = power_of_two(exponent), grown = (1.0 + 0x1p-30) * power_of_two(-exponent);
  double residual_square = 0, square = 0;
  for (i64 pair = threadIdx.x % 32; pair < padded / 2; pair += 32) {
    u32 bits = 0;
    for (int i = 0; i < 2; ++i) {
      const i64 d = 2 * pair + i;
      const double scaled = d < dim ? double(value(d)) * scale : 0.0;
      double residual = 0;
      bits |= u32(half_of(scaled, &residual)) << 16 * i;
      residual_square += residual * residual, square += (scaled - residual) * (scaled - residual);
    }
    put(pair, bits);
  }
  return {round_up(sqrt(warp_sum(residual_square)) * grown), round_up(sqrt(warp_sum(square)) * grown)};
}

// Within a step of 32 components the pairs of one vector stand as mma wants them: k16 step, half of it, quad.
struct PairAt {
  int k16, half, quad;
  __device__ explicit PairAt(i64 pair) : k16(int(pair % 16 / 8)), half(int(pair % 8 / 4)), quad(int(pair % 4)) {}
};

__device__ inline void few_code(const NearestProblem& p, const FewSpace& space, double e0, i64 g, i64 k, const float* centre) {
  const Codes& c = p.codebook;
  const Sample sample(c.size);
  const int lane = threadIdx.x % 32;
  const i64 base = c.base(g, k);
  auto centred = [&](i64 d) { return sub(load_f32(c.data, c.dtype, base + d * c.stride_d), centre[d]); };
  double square = 0, centre_square = 0;
  bool finite = true, differs[4] = {k == 0, k <= sample.code[0], k <= sample.code[1], k <= sample.code[2]};
  for (i64 d = lane; d < c.dim; d += 32) {
    const float value = load_f32(c.data, c.dtype, base + d * c.stride_d), u = centred(d), m = centre[d];
    finite = finite && is_finite(value);
    square += double(u) * double(u), centre_square += double(m) * double(m);
    // Nothing more is read once a lane has seen a difference.
    differs[0] = differs[0] || value != load_f32(c.data, c.dtype, base - c.stride_k + d * c.stride_d);
    for (int i = 0; i < 3; ++i) differs[i + 1] = differs[i + 1] || value != sample.value(c, g, i, d);
  }
  // A copy of the code before it, or of a sampled one before it, can never win: a codebook of copies costs nothing.
  bool never = ballot(kFullWarp, !finite) != 0;
  for (bool other : differs) never = never || ballot(kFullWarp, other) == 0;
  const double extra = p.metric == kDot ? 0x1p-28 * sqrt(warp_sum(centre_square)) * (1.0 + 0x1p-34) : 0.0;
  square = warp_sum(square);
  const double length = sqrt(square) * (1.0 + 0x1p-34) + extra;
  const bool wild = !(length <= kWildLength), usable = !never && !wild;
  const int exponent = usable ? scale_exponent(float(length)) : 0;
  u32* out = space.codes + (g * space.code_tiles + k / kFewCodes) * space.tile_words(kFewCodes);
  out += k % kFewCodes / 8 * 128 + k % 8 * 16;
  const ImageNorms image = few_image(
      c.dim, space.padded_dim, exponent, [&](i64 d) { return usable ? centred(d) : 0.0f; },
      [&](i64 pair, u32 bits) {
        const PairAt at(pair);
        out[pair / 16 * (16 * kFewCodes) + at.quad * 4 + at.k16 * 2 + at.half] = bits;
      });
  if (lane != 0) return;
  const float wild_score = p.metric == kL2 ? kWildScore : -kInfinity;
  const float half_norm = p.metric == kL2 ? round_down(square / 2 * (1.0 - e0)) : 0.0f;
  space.code[g * c.size + k] = {never ? kInfinity : wild ? wild_score : half_norm, float(power_of_two(-exponent)), usable ? round_up(length) : 0.0f,
                                usable ? image.residual : 0.0f};
}

__device__ inline void few_row(const NearestProblem& p, const FewSpace& space, double e0, i64 g, i64 row, const float* centre) {
  const Rows& x = p.x;
  const int lane = threadIdx.x % 32;
  const i64 base = x.base(g, row);
  auto centred = [&](i64 d) {
    const float value = load_f32(x.data, x.dtype, base + d * x.stride_d);
    return p.metric == kL2 ? sub(value, centre[d]) : value;
  };
  double square = 0;
  bool finite = true;
  for (i64 d = lane; d < x.dim; d += 32) {
    finite = finite && is_finite(load_f32(x.data, x.dtype, base + d * x.stride_d));
    const double moved = centred(d);
    square += moved * moved;
  }
  finite = ballot(kFullWarp, !finite) == 0;
  const float length = round_up(sqrt(warp_sum(square)) * (1.0 + 0x1p-34));
  const bool usable = finite && length <= kTameRow;
  const int exponent = usable ? scale_exponent(length) : 0;
  u32* out = space.rows + (g * space.row_tiles + row / kFewRows) * space.tile_words(kFewRows);
  out += row % kFewRows / 16 * 256 + row % 8 * 16 + row % 16 / 8;
  const ImageNorms image = few_image(
      x.dim, space.padded_dim, exponent, [&](i64 d) { return usable ? centred(d) : 0.0f; },
      [&](i64 pair, u32 bits) {
        const PairAt at(pair);
        out[pair / 16 * (16 * kFewRows) + at.k16 * 128 + at.quad * 4 + at.half * 2] = bits;
      });
  if (lane != 0) return;
  const BatchRow at(row, x.count);
  const bool masked = p.mask.data && !p.mask.data[at.batch * p.mask.stride_b + at.position * p.mask.stride_n];
  const double added = tensor_core_bound(space.padded_dim / 16), own = image.own;
  // E = by_length |U| + by_residual |U - uh|, a little more for the float32 operations that put L together.
  const double by_length = (double(image.residual) + added * own + e0 * double(length)) * 1.0001, by_residual = own * (1 + added) * 1.0001;
  const float state = masked ? -1.0f : !finite ? float_of(0x7FC00000u) : usable ? length : kInfinity;
  space.row[g * x.rows() + row] = {float(power_of_two(-exponent)), usable ? round_up(by_length) : 0.0f, usable ? round_up(by_residual) : 0.0f, state};
}

__global__ void __launch_bounds__(32 * kFewWarps) nearest_few_prepare_kernel(NearestProblem p, FewSpace space, double e0) {
  VQ_SHARED(FewCentre, centre);
  const i64 item = i64(blockIdx.x) * kFewWarps + threadIdx.x / 32, g = blockIdx.y;
  const Sample sample(p.codebook.size);
  for (i64 d = threadIdx.x; d < p.x.dim; d += 32 * kFewWarps) centre.of[d] = sample.centre(p.codebook, g, d);
  sync_threads();
  if (item < p.codebook.size)
    few_code(p, space, e0, g, item, centre.of);
  else if (item < p.codebook.size + p.x.rows())
    few_row(p, space, e0, g, item - p.codebook.size, centre.of);
}

// ---- screen ---------------------------------------------------------------------------------------------------------------------

constexpr int kFewThreads = 256, kFewStages = 3;
constexpr int kFewStageWords = 16 * (kFewRows + kFewCodes);  // 32 components of both tiles: 24 KiB

struct FewTiles {
  alignas(16) u32 ring[kFewStages][kFewStageWords];
  alignas(16) CodeBound code[kFewCodes];
  RowBound row[kFewRows];
  Near near[4][kFewRows];  // of each warp's 64 codes
};

// Warp (i, j) of 2 x 4 owns 64 rows x 64 codes: 64 mma for 16 reads of 16 bytes per step of 32 components. Bytes from L2: 96 D KiB / 128
// per 128 x 256 D products, so that one wave of blocks reads each side a few times only.
__global__ void __launch_bounds__(kFewThreads, 1) nearest_few_screen_kernel(NearestProblem p, FewSpace space) {
  VQ_DYNAMIC_SHARED(bytes);
  FewTiles& tiles = *reinterpret_cast<FewTiles*>(bytes);
  const i64 g = blockIdx.z, rows = p.x.rows(), size = p.codebook.size;
  const i64 first_row = i64(blockIdx.x) * kFewRows, first_code = i64(blockIdx.y) * kFewCodes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, across = warp % 4, down = warp / 4;
  const int steps = int(space.padded_dim / 32);
  const u32* from_rows = space.rows + (g * space.row_tiles + blockIdx.x) * space.tile_words(kFewRows) + threadIdx.x * 4;
  const u32* from_codes = space.codes + (g * space.code_tiles + blockIdx.y) * space.tile_words(kFewCodes) + threadIdx.x * 4;
  auto copy_next = [&](int step) {
    constexpr int kRowWords = 16 * kFewRows, kCodeWords = 16 * kFewCodes, kAtOnce = kFewThreads * 4;
    u32* to = tiles.ring[step % kFewStages] + threadIdx.x * 4;
    for (int i = 0; step < steps && i < kRowWords; i += kAtOnce) copy_async16(to + i, from_rows + i64(step) * kRowWords + i, 16);
    for (int i = 0; step < steps && i < kCodeWords; i += kAtOnce) copy_async16(to + kRowWords + i, from_codes + i64(step) * kCodeWords + i, 16);
    copy_commit();
  };
  for (int i = 0; i < kFewStages - 1; ++i) copy_next(i);
  for (int i = threadIdx.x; i < kFewCodes; i += kFewThreads)
    tiles.code[i] = first_code + i < size ? space.code[g * size + first_code + i] : CodeBound{kInfinity, 0, 0, 0};
  if (threadIdx.x < kFewRows && first_row + threadIdx.x < rows) tiles.row[threadIdx.x] = space.row[g * rows + first_row + threadIdx.x];

  float acc[4][8][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_wait<kFewStages - 2>();
    sync_threads();  // this step has landed for all, and all are done with the one whose place is filled next
    copy_next(step + kFewStages - 1);
    const u32* left = tiles.ring[step % kFewStages] + down * 4 * 256 + lane * 4;
    const u32* right = tiles.ring[step % kFewStages] + 16 * kFewRows + across * 8 * 128 + lane * 4;
    u32 b[8][4];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int w = 0; w < 4; ++w) b[j][w] = right[j * 128 + w];
#pragma unroll
    for (int k16 = 0; k16 < 2; ++k16)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 a[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) a[w] = left[i * 256 + k16 * 128 + w];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const u32 columns[2] = {b[j][2 * k16], b[j][2 * k16 + 1]};
          mma_16x8x16(acc[i][j], a, columns);
        }
      }
  }
  copy_wait<0>();
  sync_threads();  // of no steps, too: the bounds have been written

  // Lower bounds. A thread sees 16 codes of each of its 8 rows. Past the last code L is inf or NaN, and take() takes neither.
#pragma unroll
  for (int slot = 0; slot < 8; ++slot) {
    const int within = down * 64 + slot / 2 * 16 + slot % 2 * 8 + lane / 4;
    const RowBound row = tiles.row[within];
    Top top{kInfinity, kInfinity, kNoCode};
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int k = across * 64 + j * 8 + lane % 4 * 2 + c;
        const CodeBound code = tiles.code[k];
        top.take(lower_bound(row, code, acc[slot / 2][j][slot % 2 * 2 + c]), int(first_code) + k);
      }
    Near near(top);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) near.merge(near.shuffled(step));
    if (lane % 4 == 0) tiles.near[across][within] = near;
  }
  sync_threads();
  if (threadIdx.x >= kFewRows || first_row + threadIdx.x >= rows) return;
  Near near = tiles.near[0][threadIdx.x];
  for (int i = 1; i < 4; ++i) near.merge(tiles.near[i][threadIdx.x]);
  space.near[(i64(blockIdx.y) * p.x.groups + g) * rows + first_row + threadIdx.x] = near;
}

// ---- settle: a warp owns a row --------------------------------------------------------------------------------------------------

// Upper bound of the score of a code whose L is known; a wild code's says nothing.
__device__ inline float upper_bound(const NearestProblem& p, const FewSpace& space, double e0, i64 g, const RowBound& row, float lower, int k) {
  if (!(fabsf(lower) < kWildScore)) return kInfinity;
  const CodeBound code = space.code[g * p.codebook.size + k];
  const double length = code.length, of_norm = p.metric == kL2 ? e0 * length * length / 2 : 0.0;
  const double error = double(row.by_length) * length + double(row.by_residual) * double(code.residual) + of_norm;
  return round_up(double(lower) + 2.02 * error + screen_slack(p.metric, p.x.dim, row.length));
}

__global__ void __launch_bounds__(32 * kFewWarps, 1) nearest_few_settle_kernel(NearestProblem p, FewSpace space, double e0) {
  const i64 g = blockIdx.y, rows = p.x.rows(), row = i64(blockIdx.x) * kFewWarps + threadIdx.x / 32, size = p.codebook.size;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const i64 place = p.x.place(g, row), x_base = p.x.base(g, row), tiles = space.code_tiles;
  const RowBound bound = space.row[g * rows + row];
  const bool masked = bound.length == -1.0f, searched = bound.length >= 0;
  auto near_of = [&](i64 tile) { return space.near[(tile * p.x.groups + g) * rows + row]; };

  float limit = kInfinity;  // no code whose L lies above it can win
  for (i64 tile = lane; bound.length < kInfinity && searched && tile < tiles; tile += 32) {
    const Near near = near_of(tile);
    const float best = upper_bound(p, space, e0, g, bound, near.best, near.code);
    const float next = near.next == kNoCode ? kInfinity : upper_bound(p, space, e0, g, bound, near.second, near.next);
    limit = best < limit ? best : limit, limit = next < limit ? next : limit;
  }
  for (int step = 16; step; step >>= 1) {
    const float other = shfl_xor(kFullWarp, limit, step);
    limit = other < limit ? other : limit;
  }

  Nearest found{double(kInfinity), kNoCode};
  auto evaluate = [&](i64 k) { found.take(exact_score(p, g, x_base, k, 1.0), int(k)); };
  for (i64 start = 0; searched && start < tiles; start += 32) {
    const Near near = start + lane < tiles ? near_of(start + lane) : Near();
    const u32 whole = ballot(kFullWarp, near.hides_codes_up_to(limit));
    if (!(whole >> lane & 1)) {
      if (near.best < kInfinity && near.best <= limit) evaluate(near.code);
      if (near.second < kInfinity && near.second <= limit) evaluate(near.next);
    }
    for (u32 bits = whole; bits; bits &= bits - 1) {
      const i64 first = (start + popcount((bits & (0u - bits)) - 1)) * kFewCodes;
      for (i64 k = first + lane; k < first + kFewCodes && k < size; k += 32)
        if (space.code[g * size + k].half_norm < kInfinity) evaluate(k);
    }
  }
  for (int step = 16; step; step >>= 1) {
    const double score = shfl_xor(kFullWarp, found.score, step);
    found.take(score, shfl_xor(kFullWarp, found.code, step));
  }
  if (lane != 0) return;
  const bool answered = searched && found.code != kNoCode;
  space.limit[g * rows + row] = limit;
  p.indices[place] = masked ? -1 : answered ? found.code : 0;
  p.distance[place] = masked ? 0.0f : answered ? distance_of(p.metric, found.score, 1.0) : float_of(0x7FC00000u);
}

}  // namespace vq
