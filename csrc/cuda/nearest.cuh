// nearest, exact, on any GPU from sm_80 on: a float32 screen, and float64 where the screen cannot tell.
//
//     rows --> lengths --+                                        rows that are settled: float64 distance of their code
//                        +--> screen: best and second best  --> settle                     |
//     codes -> centred --+    lower bound of each row             rows that are not: rescan, float64 for each near code
//
// The screen computes for a row and a code a value L with  L <= score <= L + 2 E  (codebook.cuh derives E). If the second
// smallest L lies above the upper bound of the smallest, no other code can win: the row is settled. Else every code whose L does
// not lie above that bound is evaluated by the contract's own formula. The answer does not depend on tiles, splits or order.
#pragma once

#include "cuda/codebook.cuh"

namespace vq {

constexpr int kTileRows = 128, kTileCodes = 128, kTileDims = 16, kScreenThreads = 256;
constexpr int kPatch = 8;  // a thread owns 8 x 8 scores: 64 FMAs for 4 shared-memory reads of 16 bytes

constexpr float kInfinity = __builtin_huge_valf();

__device__ __forceinline__ float row_value(const Rows& x, const float* centre, i64 base, i64 d) {
  const float value = load_f32(x.data, x.dtype, base + d * x.stride_d);
  return centre ? sub(value, centre[d]) : value;
}

// ---- lengths of rows: a warp owns 32 rows ------------------------------------------------------------------------------------

constexpr int kRowWarps = 4, kRowBlock = 32 * kRowWarps;  // rows per block

__device__ __forceinline__ double finite_square(const Rows& x, const float* centre, i64 base, i64 d) {
  const float value = load_f32(x.data, x.dtype, base + d * x.stride_d);
  if (!is_finite(value)) return double(float_of(0x7FC00000u));
  const double moved = centre ? sub(value, centre[d]) : value;
  return moved * moved;
}

__global__ void __launch_bounds__(kRowBlock) nearest_rows_kernel(NearestProblem p, NearestSpace space) {
  const Rows& x = p.x;
  const int lane = threadIdx.x % 32;
  const i64 rows = x.rows(), g = blockIdx.y, first = i64(blockIdx.x) * kRowBlock + threadIdx.x / 32 * 32;
  const float* centre = p.metric == kL2 ? space.centre + g * x.dim : nullptr;
  const i64 mine = first + lane;
  double square = 0;
  if (x.rows_adjacent()) {
    const i64 base = mine < rows ? x.base(g, mine) : 0;
    for (i64 d = 0; mine < rows && d < x.dim; ++d) square += finite_square(x, centre, base, d);
  } else {
    for (int i = 0; i < 32 && first + i < rows; ++i) {
      const i64 base = x.base(g, first + i);
      double part = 0;
      for (i64 d = lane; d < x.dim; d += 32) part += finite_square(x, centre, base, d);
      part = warp_sum(part);
      if (lane == i) square = part;
    }
  }
  if (mine >= rows) return;
  float length = round_up(sqrt(square) * (1.0 + 0x1p-34));
  const i64 b = mine / x.count, n = mine % x.count;
  if (p.mask.data && !p.mask.data[b * p.mask.stride_b + n * p.mask.stride_n]) length = -1.0f;
  space.row_length[g * rows + mine] = length;
}

// ---- screen: a block owns 128 rows and one split of the codes ------------------------------------------------------------------

struct ScreenTiles {
  float x[2][kTileDims][kTileRows + 4];  // -x, so that the chain only adds; + 4 keeps rows 16-byte aligned and off one bank
  float c[2][kTileDims][kTileCodes + 4];
};

// The elements of a 128 x 16 chunk that one thread moves: registers between global and shared memory.
constexpr int kMoves = kTileRows * kTileDims / kScreenThreads;

struct ScreenSource {
  const Rows& x;
  const float* centre;
  const float* codes;  // of this group
  i64 group, first_row, size;
  bool by_row;

  // Neighbouring threads take neighbouring addresses.
  __device__ __forceinline__ int x_row(int i) const {
    const int e = threadIdx.x + i * kScreenThreads;
    return by_row ? e % kTileRows : e / kTileDims;
  }
  __device__ __forceinline__ int x_dim(int i) const {
    const int e = threadIdx.x + i * kScreenThreads;
    return by_row ? e / kTileRows : e % kTileDims;
  }
  __device__ __forceinline__ int c_row(int i) const { return (threadIdx.x + i * kScreenThreads) / kTileDims; }
  __device__ __forceinline__ int c_dim(int i) const { return (threadIdx.x + i * kScreenThreads) % kTileDims; }

  __device__ __forceinline__ void fetch(i64 code, i64 dim, float (&xs)[kMoves], float (&cs)[kMoves]) const {
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      const i64 row = first_row + x_row(i), d = dim + x_dim(i);
      xs[i] = row < x.rows() && d < x.dim ? -row_value(x, centre, x.base(group, row), d) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      const i64 k = code + c_row(i), d = dim + c_dim(i);
      cs[i] = k < size && d < x.dim ? codes[k * x.dim + d] : 0.0f;
    }
  }
  __device__ __forceinline__ void put(ScreenTiles& tiles, int stage, const float (&xs)[kMoves], const float (&cs)[kMoves]) const {
#pragma unroll
    for (int i = 0; i < kMoves; ++i) tiles.x[stage][x_dim(i)][x_row(i)] = xs[i];
#pragma unroll
    for (int i = 0; i < kMoves; ++i) tiles.c[stage][c_dim(i)][c_row(i)] = cs[i];
  }
};

// Thread (ty, tx) of 16 x 16 owns rows and codes 4 t .. 4 t + 3 and 64 + 4 t .. 64 + 4 t + 3: 16-byte reads without conflicts.
__device__ __forceinline__ int patch_at(int t, int i) { return 4 * t + i % 4 + 64 * (i / 4); }

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

// Bytes: each tile pair reads 128 (rows + codes) D floats for 128^2 D FMAs, 32 FMAs a byte from L2.
__global__ void __launch_bounds__(kScreenThreads) nearest_screen_kernel(NearestProblem p, double e0, NearestSpace space) {
  VQ_SHARED(ScreenTiles, tiles);
  const i64 g = blockIdx.z, rows = p.x.rows(), size = p.codebook.size, dim = p.x.dim;
  const i64 first_row = i64(blockIdx.x) * kTileRows;
  const i64 code_tiles = ceil_div(size, kTileCodes);
  const i64 begin = code_tiles * blockIdx.y / gridDim.y * kTileCodes, end = code_tiles * (blockIdx.y + 1) / gridDim.y * kTileCodes;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const float* half_norm = space.half_norm + g * size;
  const float* length = space.length + g * size;
  const ScreenSource source{p.x, p.metric == kL2 ? space.centre + g * dim : nullptr, space.codes + g * size * dim, g, first_row, size,
                            p.x.rows_adjacent()};
  Top top[kPatch];
  float margin[kPatch];  // -e0 |row|, rounded away from zero
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
    const i64 row = first_row + patch_at(ty, i);
    top[i] = Top{kInfinity, kInfinity, 0x7FFFFFFF};
    margin[i] = row < rows ? -round_up(e0 * double(space.row_length[g * rows + row])) : 0.0f;
  }

  const i64 chunks = ceil_div(dim, kTileDims), steps = (end - begin) / kTileCodes * chunks;
  float xs[kMoves], cs[kMoves], score[kPatch][kPatch];
  source.fetch(begin, 0, xs, cs);
  source.put(tiles, 0, xs, cs);
  sync_threads();
  i64 code = begin, chunk = 0;
  for (i64 step = 0; step < steps; ++step) {
    const int stage = int(step & 1);
    const bool last = chunk + 1 == chunks;
    // The next chunk travels while this one is multiplied.
    if (step + 1 < steps) source.fetch(last ? code + kTileCodes : code, last ? 0 : (chunk + 1) * kTileDims, xs, cs);
    if (chunk == 0) {
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        const i64 k = code + patch_at(tx, j);
        const float start = k < size ? half_norm[k] : kInfinity;
#pragma unroll
        for (int i = 0; i < kPatch; ++i) score[i][j] = start;
      }
    }
#pragma unroll
    for (int d = 0; d < kTileDims; ++d) {
      float a[kPatch], b[kPatch];
#pragma unroll
      for (int i = 0; i < kPatch; ++i) a[i] = tiles.x[stage][d][patch_at(ty, i)], b[i] = tiles.c[stage][d][patch_at(tx, i)];
#pragma unroll
      for (int i = 0; i < kPatch; ++i)
#pragma unroll
        for (int j = 0; j < kPatch; ++j) score[i][j] = fma(a[i], b[j], score[i][j]);
    }
    if (last) {
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        const i64 k = code + patch_at(tx, j);
        const float reach = k < size ? length[k] : 0.0f;
#pragma unroll
        for (int i = 0; i < kPatch; ++i) top[i].take(fma(margin[i], reach, score[i][j]), int(k));
      }
    }
    if (step + 1 < steps) source.put(tiles, stage ^ 1, xs, cs);
    sync_threads();
    code = last ? code + kTileCodes : code;
    chunk = last ? 0 : chunk + 1;
  }

  // The 16 threads of one ty are half a warp.
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
    for (int step = 8; step; step >>= 1) {
      const float best = shfl_xor(kFullWarp, top[i].best, step), second = shfl_xor(kFullWarp, top[i].second, step);
      top[i].merge(best, second, shfl_xor(kFullWarp, top[i].code, step));
    }
    const i64 row = first_row + patch_at(ty, i), at = (i64(blockIdx.y) * p.x.groups + g) * rows + row;
    if (tx == 0 && row < rows) space.best[at] = top[i].best, space.second[at] = top[i].second, space.best_code[at] = top[i].code;
  }
}

// ---- the contract's formula ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ double score_term(int metric, double x, double c) {
  const double difference = sub(x, c);
  return metric == kL2 ? mul(difference, difference) : mul(x, c);
}

// What nearest minimises, from the sum of the terms and the code's norm.
__device__ __forceinline__ double score_of(int metric, double sum, double code_norm) {
  if (metric == kL2) return sum;
  if (metric == kDot) return -sum;
  return code_norm > 0 ? -div(sum, code_norm) : -0.0;
}

__device__ __forceinline__ float distance_of(int metric, double score, double row_square) {
  if (metric != kCosine) return float(score);
  return row_square > 0 ? float(add(1.0, div(score, sqrt_rn(row_square)))) : 1.0f;
}

// ---- settle: a warp owns 32 rows --------------------------------------------------------------------------------------------------

struct SettleTerms {
  double of[kRowWarps][32][33];
};

struct RowBases {
  i64 x[kRowWarps][32], c[kRowWarps][32];
};

// Sums of `term(row, d)` over ascending d for the 32 rows of a warp; lane i gets row i's.
// by_row: each lane walks its own row; else the lanes fetch each row together and sum their own from shared memory.
template <class Term>
__device__ double chain_of_rows(i64 dim, bool by_row, bool active, double (&terms)[32][33], Term term) {
  const int lane = threadIdx.x % 32;
  double sum = 0;
  if (by_row) {
    for (i64 d = 0; active && d < dim; ++d) sum = add(sum, term(lane, d));
    return sum;
  }
  const u32 rows = ballot(kFullWarp, active);
  for (i64 start = 0; start < dim; start += 32) {
    const int count = dim - start < 32 ? int(dim - start) : 32;
    for (int i = 0; i < 32; ++i)
      if ((rows >> i & 1) && lane < count) terms[i][lane] = term(i, start + lane);
    sync_warp();
    for (int j = 0; active && j < count; ++j) sum = add(sum, terms[lane][j]);
    sync_warp();
  }
  return sum;
}

// The best of all splits, and whether the screen proves it. A row that it does not prove gets *limit, what a winner's L may be.
__device__ __forceinline__ bool settled_by_screen(const NearestProblem& p, double e0, const NearestSpace& space, i64 g, i64 row, float length,
                                                  int* code, float* limit) {
  const i64 rows = p.x.rows(), size = p.codebook.size;
  Top top{kInfinity, kInfinity, 0x7FFFFFFF};
  for (int s = 0; s < space.splits; ++s) {
    const i64 at = (s * p.x.groups + g) * rows + row;
    top.merge(space.best[at], space.second[at], space.best_code[at]);
  }
  *code = top.code;
  *limit = kInfinity;
  const bool tame = length <= kTameRow && p.x.dim <= kScreenedDim;
  if (!tame || top.code >= size || (p.metric == kDot && space.wild_codes[g])) return false;
  const double reach = space.length[g * size + top.code], row_length = length;
  const double share = p.metric == kL2 ? reach / 2 + row_length : row_length;
  const double upper = double(top.best) + 2.02 * e0 * reach * share + screen_slack(p.metric, p.x.dim, row_length);
  // Below 2^120 no wild code can win: it is at least 2^62 - 2^60 away.
  if (!(upper <= 0x1p120)) return false;
  *limit = round_up(upper);
  return double(top.second) > upper;
}

__global__ void __launch_bounds__(kRowBlock) nearest_settle_kernel(NearestProblem p, double e0, NearestSpace space) {
  VQ_SHARED(SettleTerms, terms);
  const Rows& x = p.x;
  const Codes& c = p.codebook;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const i64 rows = x.rows(), g = blockIdx.y, first = i64(blockIdx.x) * kRowBlock + warp * 32, row = first + lane;
  if (first >= rows) return;
  const int first_code = space.first_code[g];
  const float length = row < rows ? space.row_length[g * rows + row] : -1.0f;

  // Which code, and whether its distance is to be computed here.
  i64 code = 0;
  bool active = false;
  if (row < rows && length >= 0 && first_code < c.size) {
    int found = 0;
    float limit = kInfinity;
    if (length == 0 && p.metric != kL2) {  // a zero row scores 0 with every code
      code = first_code, active = true;
    } else if (settled_by_screen(p, e0, space, g, row, length, &found, &limit)) {
      code = found, active = true;
    } else {
      const i64 at = g * rows + i64(atomic_add(&space.open[g], 1ull));
      space.open_row[at] = row, space.open_limit[at] = limit;
    }
  }

  const bool by_row = x.rows_adjacent();
  VQ_SHARED(RowBases, bases);  // for the lanes that help a row
  bases.x[warp][lane] = row < rows ? x.base(g, row) : 0, bases.c[warp][lane] = c.base(g, code);
  sync_warp();
  const double sum = chain_of_rows(x.dim, by_row, active, terms.of[warp], [&](int i, i64 d) {
    return score_term(p.metric, load_f32(x.data, x.dtype, bases.x[warp][i] + d * x.stride_d),
                      load_f32(c.data, c.dtype, bases.c[warp][i] + d * c.stride_d));
  });
  double row_square = 0;
  if (p.metric == kCosine)
    row_square = chain_of_rows(x.dim, by_row, active, terms.of[warp], [&](int i, i64 d) {
      const double value = load_f32(x.data, x.dtype, bases.x[warp][i] + d * x.stride_d);
      return mul(value, value);
    });
  if (row >= rows) return;
  const i64 place = x.place(g, row);
  const double norm = p.metric == kCosine ? space.code_norm[g * c.size + code] : 1.0;
  const bool masked = length == -1.0f;
  p.indices[place] = masked ? -1 : code;
  p.distance[place] = active ? distance_of(p.metric, score_of(p.metric, sum, norm), row_square) : masked ? 0.0f : float_of(0x7FC00000u);
}

// ---- rescan: a block owns four open rows at a time ---------------------------------------------------------------------------------

constexpr int kOpenRows = 4, kOpenThreads = 256, kOpenDims = 64;
constexpr int kOpenWarps = kOpenThreads / 32;

struct OpenTiles {
  float x[kOpenRows][kOpenDims];  // -x, a chunk of d
  double score[kOpenWarps];
  int code[kOpenWarps];
};

struct Nearest {
  double score;
  int code;
  __device__ __forceinline__ void take(double other, int k) {
    if (other < score || (other == score && k < code)) score = other, code = k;
  }
};

__device__ inline double exact_score(const NearestProblem& p, const NearestSpace& space, i64 g, i64 x_base, i64 k) {
  const i64 c_base = p.codebook.base(g, k);
  double sum = 0;
  for (i64 d = 0; d < p.x.dim; ++d)
    sum = add(sum, score_term(p.metric, load_f32(p.x.data, p.x.dtype, x_base + d * p.x.stride_d),
                              load_f32(p.codebook.data, p.codebook.dtype, c_base + d * p.codebook.stride_d)));
  return score_of(p.metric, sum, p.metric == kCosine ? space.code_norm[g * p.codebook.size + k] : 1.0);
}

// The lexicographic minimum of (score, code) over the block, returned to thread 0.
__device__ inline Nearest block_nearest(Nearest mine, OpenTiles& tiles) {
  for (int step = 16; step; step >>= 1) {
    const double score = shfl_xor(kFullWarp, mine.score, step);
    mine.take(score, shfl_xor(kFullWarp, mine.code, step));
  }
  if (threadIdx.x % 32 == 0) tiles.score[threadIdx.x / 32] = mine.score, tiles.code[threadIdx.x / 32] = mine.code;
  sync_threads();
  if (threadIdx.x == 0)
    for (int i = 1; i < kOpenWarps; ++i) mine.take(tiles.score[i], tiles.code[i]);
  sync_threads();
  return mine;
}

// Thread t takes codes t, t + 256, ...; the four rows share each code that it reads.
__global__ void __launch_bounds__(kOpenThreads) nearest_rescan_kernel(NearestProblem p, double e0, NearestSpace space) {
  VQ_SHARED(OpenTiles, tiles);
  const Rows& x = p.x;
  const i64 g = blockIdx.y, rows = x.rows(), size = p.codebook.size, open = i64(space.open[g]);
  const float* centre = p.metric == kL2 ? space.centre + g * x.dim : nullptr;
  for (i64 start = i64(blockIdx.x) * kOpenRows; start < open; start += i64(gridDim.x) * kOpenRows) {
    i64 base[kOpenRows];
    float limit[kOpenRows], margin[kOpenRows];
    Nearest nearest[kOpenRows];
#pragma unroll
    for (int i = 0; i < kOpenRows; ++i) {
      // Past the end: the last row once more, whose result is not written.
      const i64 at = g * rows + (start + i < open ? start + i : open - 1), row = space.open_row[at];
      base[i] = x.base(g, row);
      limit[i] = space.open_limit[at];
      margin[i] = -round_up(e0 * double(space.row_length[g * rows + row]));
      nearest[i] = Nearest{double(kInfinity), 0x7FFFFFFF};
    }
    for (i64 block = 0; block < size; block += kOpenThreads) {
      const i64 k = block + threadIdx.x;
      const int state = k < size ? int(space.state[g * size + k]) : int(kNever);
      float score[kOpenRows];
#pragma unroll
      for (int i = 0; i < kOpenRows; ++i) score[i] = state == kScreened ? space.half_norm[g * size + k] : 0.0f;
      for (i64 d0 = 0; d0 < x.dim; d0 += kOpenDims) {
        const int dims = x.dim - d0 < kOpenDims ? int(x.dim - d0) : kOpenDims;
        const int i = threadIdx.x / kOpenDims, j = threadIdx.x % kOpenDims;  // 256 threads fetch 4 x 64 values
        sync_threads();
        i64 row_base = base[0];
#pragma unroll
        for (int r = 1; r < kOpenRows; ++r) row_base = i == r ? base[r] : row_base;
        tiles.x[i][j] = j < dims ? -row_value(x, centre, row_base, d0 + j) : 0.0f;
        sync_threads();
        if (state == kScreened)
          for (int d = 0; d < dims; ++d) {
            const float code = space.codes[(g * size + k) * x.dim + d0 + d];
#pragma unroll
            for (int r = 0; r < kOpenRows; ++r) score[r] = fma(tiles.x[r][d], code, score[r]);
          }
      }
      if (state == kNever) continue;
      const float reach = space.length[g * size + k];
#pragma unroll
      for (int r = 0; r < kOpenRows; ++r) {
        // Written so that NaN, from rows whose products overflow, counts as near.
        const bool far = state == kScreened && fma(margin[r], reach, score[r]) > limit[r];
        if (!far) nearest[r].take(exact_score(p, space, g, base[r], k), int(k));
      }
    }
#pragma unroll
    for (int r = 0; r < kOpenRows; ++r) {
      if (start + r >= open) break;  // the same for the whole block
      const Nearest found = block_nearest(nearest[r], tiles);
      if (threadIdx.x != 0) continue;
      const i64 place = x.place(g, space.open_row[g * rows + start + r]);
      double row_square = 0;
      for (i64 d = 0; p.metric == kCosine && d < x.dim; ++d) {
        const double value = load_f32(x.data, x.dtype, base[r] + d * x.stride_d);
        row_square = add(row_square, mul(value, value));
      }
      p.indices[place] = found.code;
      p.distance[place] = distance_of(p.metric, found.score, row_square);
    }
  }
}

}  // namespace vq
