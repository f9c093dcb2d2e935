// nearest's screen on Hopper: a float16 product on wgmma, with the argmin hidden under it and a bound that is measured.
//
//     codes, rows (float32, packed) --> float16 images --> screen: wgmma, smallest groups of 8 codes --> refine: float32 bounds
//                                                                                                        of a few groups
// It stands where nearest_screen_kernel stands and leaves what that leaves: per row the smallest and second smallest lower bound
// of a score. Settling and rescanning are the same kernels, so the answer is the same.
//
// Scaled scores. With p, q powers of two for the codebook and the row, x' = 2^q x, u' = 2^p u and their float16 images xh, uh,
//     acc = sum xh uh + 2^(p+q) half_norm + bias,        |x' u' - xh uh| <= |x' - xh| |u'| + |xh| |u' - uh|  (Cauchy-Schwarz)
// where the two residual norms are measured, not assumed. half_norm and bias ride in one more k16 step, so acc >= 0 and its bits
// order as integers: a group of 8 scores costs 4 minimum instructions, one to put the group's number into the lowest bits, and 3
// to keep the two smallest.
#pragma once

#include "cuda/bounds.cuh"

#ifdef VQFAST_EXECUTOR
#include "testing/hopper_cpu.h"
#else
#include "cuda/hopper_gpu.h"
#endif

namespace vq {

constexpr int kHalfCodes = 128;     // codes per tile: one wgmma's columns
constexpr int kHalfBlock = 64;      // rows of one wgmma
constexpr int kHalfGroups = 4;      // groups of 8 codes that one thread sees per row and tile
constexpr int kHalfMaxSteps = 17;   // D <= 256, and the step of the norms
constexpr float kExcluded = 30000;  // the scaled score of a code that is never chosen; others stay below 6000
constexpr float kNoEntry = 3.0e38f;

// ---- float16 images ---------------------------------------------------------------------------------------------------------------

// A thread owns a code: column (k % 128) of its tile, permuted so that a thread of the screen holds groups of 8 neighbours.
__global__ void __launch_bounds__(128) nearest_code_halves_kernel(NearestProblem p, NearestSpace space) {
  const i64 g = blockIdx.y, tiles = gridDim.x, size = p.codebook.size, k = i64(blockIdx.x) * kTile + threadIdx.x;
  const int c = threadIdx.x, within = c % 8;
  const int column = (c % 32 / 8 * 4 + within / 2) * 8 + c / 32 * 2 + within % 2;
  const float* from = space.codes + (g * tiles + blockIdx.x) * space.padded_dim * kTile + c;
  auto* tile = reinterpret_cast<uint16_t*>(space.code_halves) + (g * tiles + blockIdx.x) * space.steps * (16 * kHalfCodes);
  auto at = [&](int kk) -> uint16_t& { return tile[((kk / 16 * 2 + kk % 16 / 8) * 16 + column / 8) * 64 + column % 8 * 8 + kk % 8]; };
  const bool screened = k < size && space.state[g * size + k] == kScreened;
  const double scale = power_of_two(scale_exponent(float_of(u32(space.longest[g]))));
  const int dims = (space.steps - 1) * 16;
  double square = 0, residual = 0;
  for (int d = 0; d < dims; ++d) {
    at(d) = half_of(screened && d < p.x.dim ? double(from[i64(d) * kTile]) * scale : 0.0, &residual);
    square += residual * residual;
  }
  // The last step: half_norm in three pieces, one for the bias, and whether the code is excluded.
  double norm = screened ? double(space.half_norm[g * size + k]) * scale * scale : 0.0;
  for (int i = 0; i < 16; ++i) at(dims + i) = 0;
  for (int i = 0; i < 3; ++i) at(dims + i) = half_of(norm, &norm);
  at(dims + 3) = f32_to_f16(1.0f);
  at(dims + 4) = f32_to_f16(screened ? 0.0f : 1.0f);
  if (screened) atomic_max(&space.code_residual[g], int(bits_of(round_up(sqrt(square) * (1.0 + 0x1p-30)))));
}

// A thread owns a row: its float16 image in the order of wgmma's A registers, and the bound of its scaled scores.
__global__ void __launch_bounds__(kHalfBlock) nearest_row_halves_kernel(NearestProblem p, NearestSpace space) {
  const i64 g = blockIdx.y, rows = p.x.rows(), row = i64(blockIdx.x) * kHalfBlock + threadIdx.x;
  const int r = threadIdx.x, dims = (space.steps - 1) * 16;
  const float* from = space.rows + (g * ceil_div(rows, kTile) + row / kTile) * space.padded_dim * kTile + row % kTile;
  u32* block = space.row_halves + (g * gridDim.x + blockIdx.x) * space.steps * (128 * 4);
  auto put = [&](int kk, u32 pair) { block[((kk / 16) * 128 + r / 16 * 32 + r % 8 * 4 + kk % 8 / 2) * 4 + r % 16 / 8 + 2 * (kk % 16 / 8)] = pair; };

  const float length = row < rows ? space.row_length[g * rows + row] : -1.0f, longest = float_of(u32(space.longest[g]));
  const int code_exponent = scale_exponent(longest), own_exponent = length > 0 ? scale_exponent(length) : 60;
  const int exponent = own_exponent < code_exponent ? own_exponent : code_exponent;
  const bool usable = length >= 0 && length <= kTameRow && code_exponent - exponent <= 24;
  const double scale = power_of_two(exponent), code_scale = power_of_two(code_exponent), ratio = usable ? power_of_two(exponent - code_exponent) : 0.0;
  double square = 0, residual_square = 0;
  for (int kk = 0; kk < dims; kk += 2) {
    u32 pair = 0;
    for (int i = 0; i < 2; ++i) {
      const double value = usable && kk + i < p.x.dim ? double(from[i64(kk + i) * kTile]) * scale : 0.0;
      double residual = 0;
      const uint16_t bits = half_of(value, &residual);
      const double image = value - residual;
      square += image * image, residual_square += residual * residual;
      pair |= u32(bits) << 16 * i;
    }
    put(kk, pair);
  }
  // Magnitudes of scaled quantities, all rounded up.
  const double grown = 1.0 + 0x1p-30, code_length = double(longest) * code_scale, row_length = double(length) * scale;
  const double image = sqrt(square) * grown, residual = sqrt(residual_square) * grown;
  const double code_residual = float_of(u32(space.code_residual[g])), norm = code_length * code_length / 2 * ratio;
  // The smallest scaled score: |u|^2/2 - |x||u| is at least -|x||u|, and for l2 at least -|x|^2/2 (0.51 covers half_norm's share).
  double lowest = row_length * code_length;
  if (p.metric == kL2 && 0.51 / ratio * row_length * row_length < lowest) lowest = 0.51 / ratio * row_length * row_length;
  const double magnitude = image * (code_length + code_residual) + norm + 2 * lowest + 8;
  const double accumulation = tensor_core_bound(space.steps) * magnitude;
  const double error = (residual * code_length + image * code_residual + norm * 0x1p-30 + accumulation) * 1.001 + 0x1p-20;
  const float bias = f16_to_f32(f32_to_f16(float((lowest + 1.5 * error) * (1.0 + 0x1p-9) + 0x1p-6)));
  const bool good = usable && double(bias) <= 2 * lowest + 8 && error < 1e4;
  const u32 power = good ? f32_to_f16(float(ratio)) : 0;
  for (int kk = 0; kk < 16; kk += 2) put(dims + kk, 0);
  put(dims, power | power << 16);
  put(dims + 2, power | u32(f32_to_f16(bias)) << 16);
  put(dims + 4, f32_to_f16(kExcluded));
  if (row >= rows) return;
  space.row_error[g * rows + row] = good ? round_up(error) : kInfinity;
  space.row_bias[g * rows + row] = bias;
  space.row_scale[g * rows + row] = float(1.0 / (scale * code_scale));
}

// ---- screen -----------------------------------------------------------------------------------------------------------------------

constexpr int kHopperThreads = 384;  // one warpgroup that copies, two that multiply

template <int kSteps>
struct HopperShape {
  static constexpr int kSlots = kSteps <= 9 ? 2 : 1;  // blocks of 64 rows per warpgroup: as many as registers hold
  static constexpr int kRows = 2 * kSlots * kHalfBlock;
  static constexpr u32 kStageBytes = kSteps * 16 * kHalfCodes * 2;
  static constexpr int kStages = kSteps <= 9 ? 4 : 3;
  static constexpr size_t kBytes = size_t(kStages) * kStageBytes;
};

struct HopperBarriers {
  u64 full[4], empty[4];
};

#if defined(VQFAST_EXECUTOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct HalfTop {  // of two rows (r, r + 8), two chains each
  int best[2][2], second[2][2];
};

// 64 scores of one thread: 2 rows x 4 groups x 8 codes. ids: the number of the chain's first group in this tile.
__device__ __forceinline__ void take_scores(const float (&acc)[64], u32 mask, u32 id, HalfTop& top) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int group = 0; group < kHalfGroups; ++group) {
      int v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = int(bits_of(acc[(group * 4 + i / 2) * 4 + half * 2 + i % 2]));
      const int low = min3(min3(v[0], v[1], v[2]), min3(v[3], v[4], v[5]), v[6] < v[7] ? v[6] : v[7]);
      const int packed = with_id(float_of(u32(low)), mask, id + group / 2);
      int &best = top.best[half][group % 2], &second = top.second[half][group % 2];
      const int worse = best < packed ? packed : best;
      second = second < worse ? second : worse;
      best = best < packed ? best : packed;
    }
  }
}

template <int kSteps>
__device__ __forceinline__ void multiply(float (&acc)[64], const u32 (&a)[kSteps][4], const unsigned char* stage) {
  wgmma_fence();
  const u64 codes = matrix_at(stage);
  wgmma_64x128x16<false>(acc, a[0], codes);
#pragma unroll
  for (int s = 1; s < kSteps; ++s) wgmma_64x128x16<true>(acc, a[s], codes + u64(s * 16 * kHalfCodes * 2 >> 4));
  wgmma_commit();
}

// The warpgroup that copies: one thread keeps the ring of code tiles full.
template <int kSteps>
__device__ __forceinline__ void hopper_copy(const unsigned char* from, int tiles, unsigned char* ring, HopperBarriers& barriers) {
  using Shape = HopperShape<kSteps>;
  if (threadIdx.x != 0) return;
  for (int t = 0; t < tiles; ++t) {
    const int stage = t % Shape::kStages;
    if (t >= Shape::kStages) barrier_wait(&barriers.empty[stage], u32(t / Shape::kStages - 1) & 1);
    barrier_expect(&barriers.full[stage], Shape::kStageBytes);
    bulk_copy(ring + stage * Shape::kStageBytes, from + i64(t) * Shape::kStageBytes, Shape::kStageBytes, &barriers.full[stage]);
  }
}

// A warpgroup that multiplies, 64 rows per slot. With two slots the scores of one are scanned while the tensor cores make those of
// the other; with one slot the two warpgroups take turns by themselves.
template <int kSteps>
__device__ __forceinline__ void hopper_multiply(const NearestProblem& p, const NearestSpace& space, int tiles, const unsigned char* ring,
                                                HopperBarriers& barriers) {
  using Shape = HopperShape<kSteps>;
  constexpr int kSlots = Shape::kSlots;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, group = threadIdx.x / 128 - 1;
  const i64 g = blockIdx.z, rows = p.x.rows(), blocks = ceil_div(rows, kHalfBlock);
  const i64 first_block = (i64(blockIdx.x) * 2 + group) * kSlots;
  const u32 mask = ~((1u << space.id_bits) - 1);
  u32 a[kSlots][kSteps][4];
  HalfTop top[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const i64 block = first_block + s < blocks ? first_block + s : blocks - 1;  // past the end: a block whose result is not written
    const u32* from = space.row_halves + (g * blocks + block) * (kSteps * 128 * 4) + thread * 4;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[s][k][i] = from[k * 128 * 4 + i];
#pragma unroll
    for (int i = 0; i < 4; ++i) top[s].best[i / 2][i % 2] = top[s].second[i / 2][i % 2] = int(bits_of(kNoEntry));
  }

  float acc[kSlots][64];
  for (int i = 0; i < 64; ++i) acc[kSlots - 1][i] = kNoEntry;
  auto release = [&](int t) {
    if (lane == 0) barrier_arrive(&barriers.empty[t % Shape::kStages]);
  };
  for (int t = 0; t < tiles; ++t) {
    const unsigned char* stage = ring + t % Shape::kStages * Shape::kStageBytes;
    barrier_wait(&barriers.full[t % Shape::kStages], u32(t / Shape::kStages) & 1);
    multiply<kSteps>(acc[0], a[0], stage);
    if constexpr (kSlots == 2) {
      take_scores(acc[1], mask, t ? u32(t - 1) * 2 : 0u, top[1]);  // of the tile before; of the first tile, nothing
      wgmma_wait<0>(acc[0]);
      multiply<kSteps>(acc[1], a[1], stage);
      take_scores(acc[0], mask, u32(t) * 2, top[0]);
      wgmma_wait<0>(acc[1]);
      release(t);
    } else {
      wgmma_wait<0>(acc[0]);
      release(t);
      take_scores(acc[0], mask, u32(t) * 2, top[0]);
    }
  }
  if constexpr (kSlots == 2) take_scores(acc[1], mask, tiles ? u32(tiles - 1) * 2 : 0u, top[1]);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const i64 row = (first_block + s) * kHalfBlock + thread / 32 * 16 + half * 8 + lane / 4;
      if (row >= rows) continue;
      int* out = space.entries + (((i64(blockIdx.y) * p.x.groups + g) * rows + row) * 4 + lane % 4) * 4;
      for (int chain = 0; chain < 2; ++chain) out[chain * 2] = top[s].best[half][chain], out[chain * 2 + 1] = top[s].second[half][chain];
    }
  }
}

#endif

template <int kSteps>
__global__ void __launch_bounds__(kHopperThreads, 1) nearest_hopper_kernel(NearestProblem p, NearestSpace space) {
#if defined(VQFAST_EXECUTOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = HopperShape<kSteps>;
  VQ_DYNAMIC_SHARED(ring);
  VQ_SHARED(HopperBarriers, barriers);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      barrier_init(&barriers.full[i], 1);
      barrier_init(&barriers.empty[i], 8);  // warps that multiply
    }
    barrier_init_done();
  }
  sync_threads();
  const int code_tiles = int(ceil_div(p.codebook.size, kHalfCodes));
  const int first = int(i64(code_tiles) * blockIdx.y / gridDim.y), last = int(i64(code_tiles) * (blockIdx.y + 1) / gridDim.y);
  if (threadIdx.x < 128) {
    registers_down<40>();
    const auto* codes = reinterpret_cast<const unsigned char*>(space.code_halves);
    hopper_copy<kSteps>(codes + (i64(blockIdx.z) * code_tiles + first) * Shape::kStageBytes, last - first, ring, barriers);
  } else {
    registers_up<232>();
    hopper_multiply<kSteps>(p, space, last - first, ring, barriers);
  }
#endif
}

// ---- refine: 8 lanes own a row ----------------------------------------------------------------------------------------------------

constexpr int kRefineThreads = 256, kRefineRows = kRefineThreads / 8;

// Float32 lower bounds of the groups that may hold the winner, and one lower bound for all other codes.
__global__ void __launch_bounds__(kRefineThreads) nearest_refine_kernel(NearestProblem p, double e0, NearestSpace space) {
  const i64 g = blockIdx.y, rows = p.x.rows(), size = p.codebook.size, row = i64(blockIdx.x) * kRefineRows + threadIdx.x / 8;
  const int member = threadIdx.x % 8;
  const i64 at = g * rows + row, code_tiles = ceil_div(size, kTile), tile_floats = space.padded_dim * kTile;
  const float error = row < rows ? space.row_error[at] : kInfinity;
  const double coarse = power_of_two(space.id_bits - 22);  // what the group's number in the lowest bits costs, relatively
  Top top{kInfinity, kInfinity, 0x7FFFFFFF};
  float fence = kInfinity;  // smallest packed value of codes that are not looked at
  if (error < kInfinity) {
    auto entry = [&](int split, int e, int i) {
      return float_of(u32(space.entries[(((i64(split) * p.x.groups + g) * rows + row) * 8 + e) * 2 + i]));
    };
    float smallest = kInfinity;
    for (int s = 0; s < space.half_splits; ++s)
      for (int e = 0; e < 8; ++e) smallest = entry(s, e, 0) < smallest ? entry(s, e, 0) : smallest;
    const float limit = round_up(double(smallest) * (1 + 2 * coarse) + 2.01 * double(error));
    const float margin = -round_up(e0 * double(space.row_length[at]));
    const float* x = space.rows + (g * ceil_div(rows, kTile) + row / kTile) * tile_floats + row % kTile;
    for (int s = 0; s < space.half_splits; ++s) {
      const i64 first_tile = code_tiles * s / space.half_splits;
      for (int e = 0; e < 8; ++e) {
        const float value = entry(s, e, 0), next = entry(s, e, 1);
        fence = next < fence ? next : fence;
        if (!(value <= limit)) {
          fence = value < fence ? value : fence;
          continue;
        }
        const int id = int(bits_of(value) & ((1u << space.id_bits) - 1));
        const int within = e / 2 * 32 + (id % 2 * 2 + e % 2) * 8 + member;
        const i64 k = (first_tile + id / 2) * kTile + within;
        if (k >= size) continue;
        const float* c = space.codes + (g * code_tiles + first_tile + id / 2) * tile_floats + within;
        float score = space.half_norm[g * size + k];
        for (i64 d = 0; d < p.x.dim; ++d) score = fma(x[d * kTile], c[d * kTile], score);
        top.take(fma(margin, space.length[g * size + k], score), int(k));
      }
    }
  }
  for (int step = 4; step; step >>= 1) {
    const float best = shfl_xor(kFullWarp, top.best, step), second = shfl_xor(kFullWarp, top.second, step);
    top.merge(best, second, shfl_xor(kFullWarp, top.code, step));
  }
  if (member != 0 || row >= rows) return;
  // Back from scaled scores; the screen's scores lack the float32 bound that `best` already has taken off.
  const double scaled = double(fence) * (1 - coarse) - double(error) - double(space.row_bias[at]);
  const double others = scaled * double(space.row_scale[at]) - 1.01 * e0 * double(space.row_length[at]) * double(float_of(u32(space.longest[g])));
  const float bound = fence < kNoEntry / 2 ? round_down(others) : kInfinity;
  space.best[at] = top.best, space.second[at] = bound < top.second ? bound : top.second, space.best_code[at] = top.code;
}

}  // namespace vq
