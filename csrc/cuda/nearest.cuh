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
#include "cuda/exact.cuh"

namespace vq {

// ---- rows: a warp packs 32 rows for the screen and measures them --------------------------------------------------------------

constexpr int kRowWarps = 4, kRowBlock = 32 * kRowWarps;  // rows per block
static_assert(kRowBlock == kTile, "a block packs a tile");

struct RowTiles {
  float x[kRowWarps][32][33];
};

__global__ void __launch_bounds__(kRowBlock) nearest_rows_kernel(NearestProblem p, NearestSpace space) {
  VQ_SHARED(RowTiles, tiles);
  const Rows& x = p.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const i64 rows = x.rows(), g = blockIdx.y, first = i64(blockIdx.x) * kRowBlock + warp * 32, mine = first + lane;
  const float* centre = p.metric == kL2 ? space.centre + g * x.dim : nullptr;
  float* out = space.rows + (g * ceil_div(rows, kTile) + blockIdx.x) * space.padded_dim * kTile + threadIdx.x;
  const i64 base = mine < rows ? x.base(g, mine) : 0;
  const int count = first >= rows ? 0 : rows - first < 32 ? int(rows - first) : 32;
  double square = 0;
  bool finite = true;
  for (i64 d0 = 0; d0 < x.dim; d0 += 32) {
    const int dims = x.dim - d0 < 32 ? int(x.dim - d0) : 32;
    if (!x.rows_adjacent()) {  // neighbouring lanes read neighbouring components, and the tile is turned
      for (int i = 0; i < count; ++i) {
        const i64 row_base = shfl(kFullWarp, base, i);
        if (lane < dims) tiles.x[warp][i][lane] = load_f32(x.data, x.dtype, row_base + (d0 + lane) * x.stride_d);
      }
      sync_warp();
    }
    for (int j = 0; mine < rows && j < dims; ++j) {
      const i64 d = d0 + j;
      const float value = x.rows_adjacent() ? load_f32(x.data, x.dtype, base + d * x.stride_d) : tiles.x[warp][lane][j];
      finite = finite && is_finite(value);
      const float moved = centre ? sub(centre[d], value) : -value;
      out[d * kTile] = moved;
      square += double(moved) * double(moved);
    }
    sync_warp();
  }
  if (mine >= rows) return;
  for (i64 d = x.dim; d < space.padded_dim; ++d) out[d * kTile] = 0.0f;
  float length = finite ? round_up(sqrt(square) * (1.0 + 0x1p-34)) : float_of(0x7FC00000u);
  const BatchRow at(mine, x.count);
  if (p.mask.data && !p.mask.data[at.batch * p.mask.stride_b + at.position * p.mask.stride_n]) length = -1.0f;
  space.row_length[g * rows + mine] = length;
}

// ---- screen: a block owns 128 rows and one split of the codes ------------------------------------------------------------------

constexpr int kScreenThreads = 256, kStages = 4;
constexpr int kPatch = 8;  // a thread owns 8 x 8 scores: 64 FMAs for 4 shared-memory reads of 16 bytes

struct ScreenTiles {  // a ring of chunks of 8 components, filled three chunks ahead
  alignas(16) float x[kStages][kTileDims][kTile];
  alignas(16) float c[kStages][kTileDims][kTile];
  alignas(16) float margin[kTile];  // -e0 |row|, rounded away from zero
};
static_assert(kTileDims * kTile == 4 * kScreenThreads, "a thread copies 16 bytes of each side per chunk");

// Thread (ty, tx) of 16 x 16 owns rows and codes 4 t .. 4 t + 3 and 64 + 4 t .. 64 + 4 t + 3: 16-byte reads without conflicts.
__device__ __forceinline__ int patch_at(int t, int i) { return 4 * t + i % 4 + 64 * (i / 4); }

// Bytes: a pair of tiles reads 256 D floats for 128^2 D FMAs: 16 FMAs per byte from L2.
__global__ void __launch_bounds__(kScreenThreads, 2) nearest_screen_kernel(NearestProblem p, double e0, NearestSpace space) {
  VQ_SHARED(ScreenTiles, tiles);
  const i64 g = blockIdx.z, rows = p.x.rows(), first_row = i64(blockIdx.x) * kTile;
  const int size = int(p.codebook.size), code_tiles = int(ceil_div(size, kTile));
  const int first_tile = int(i64(code_tiles) * blockIdx.y / gridDim.y), last_tile = int(i64(code_tiles) * (blockIdx.y + 1) / gridDim.y);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const float* half_norm = space.half_norm + g * size;
  const float* length = space.length + g * size;
  const i64 tile_floats = space.padded_dim * kTile;
  const float* from_x = space.rows + (g * ceil_div(rows, kTile) + blockIdx.x) * tile_floats + threadIdx.x * 4;
  const float* from_c = space.codes + (g * code_tiles + first_tile) * tile_floats + threadIdx.x * 4;
  const int chunks = int(space.padded_dim / kTileDims);
  const float* const end_c = from_c + (last_tile - first_tile) * tile_floats;
  if (threadIdx.x < kTile) {
    const i64 row = first_row + threadIdx.x;
    tiles.margin[threadIdx.x] = row < rows ? -round_up(e0 * double(space.row_length[g * rows + row])) : 0.0f;
  }
  Top top[kPatch];
#pragma unroll
  for (int i = 0; i < kPatch; ++i) top[i] = Top{kInfinity, kInfinity, 0x7FFFFFFF};

  int copied_chunk = 0;
  auto copy_next = [&](int stage) {  // x starts anew with every code tile, codes go on and on
    if (from_c != end_c) {
      copy_async16(&tiles.x[stage][0][0] + threadIdx.x * 4, from_x + copied_chunk * (kTileDims * kTile), 16);
      copy_async16(&tiles.c[stage][0][0] + threadIdx.x * 4, from_c, 16);
      from_c += kTileDims * kTile;
      copied_chunk = copied_chunk + 1 == chunks ? 0 : copied_chunk + 1;
    }
    copy_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_next(i);

  int stage = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    float score[kPatch][kPatch];
#pragma unroll
    for (int j = 0; j < kPatch; ++j) {
      const int k = tile * kTile + patch_at(tx, j);
      const float start = k < size ? half_norm[k] : kInfinity;
#pragma unroll
      for (int i = 0; i < kPatch; ++i) score[i][j] = start;
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_wait<kStages - 2>();
      sync_threads();  // this chunk has landed for all, and all are done with the one whose place is filled next
      copy_next((stage + kStages - 1) % kStages);
#pragma unroll 2  // more would spill: two blocks of 256 threads share 65,536 registers
      for (int d = 0; d < kTileDims; ++d) {
        float a[kPatch], b[kPatch];
#pragma unroll
        for (int i = 0; i < kPatch; ++i) a[i] = tiles.x[stage][d][patch_at(ty, i)], b[i] = tiles.c[stage][d][patch_at(tx, i)];
#pragma unroll
        for (int i = 0; i < kPatch; ++i)
#pragma unroll
          for (int j = 0; j < kPatch; ++j) score[i][j] = fma(a[i], b[j], score[i][j]);
      }
      stage = (stage + 1) % kStages;
    }
#pragma unroll
    for (int j = 0; j < kPatch; ++j) {  // past the last code the score is inf or NaN, and take() takes neither
      const int k = tile * kTile + patch_at(tx, j);
      const float reach = k < size ? length[k] : 0.0f;
#pragma unroll
      for (int i = 0; i < kPatch; ++i) top[i].take(fma(tiles.margin[patch_at(ty, i)], reach, score[i][j]), k);
    }
  }
  copy_wait<0>();

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
  float x[kOpenRows][kOpenDims];  // as packed, a chunk of d
  double score[kOpenWarps];
  int code[kOpenWarps];
};

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
  const i64 tile_floats = space.padded_dim * kTile;
  for (i64 start = i64(blockIdx.x) * kOpenRows; start < open; start += i64(gridDim.x) * kOpenRows) {
    i64 base[kOpenRows], packed[kOpenRows];
    float limit[kOpenRows], margin[kOpenRows];
    Nearest nearest[kOpenRows];
#pragma unroll
    for (int i = 0; i < kOpenRows; ++i) {
      // Past the end: the last row once more, whose result is not written.
      const i64 at = g * rows + (start + i < open ? start + i : open - 1), row = space.open_row[at];
      base[i] = x.base(g, row);
      packed[i] = (g * ceil_div(rows, kTile) + row / kTile) * tile_floats + row % kTile;
      limit[i] = space.open_limit[at];
      margin[i] = -round_up(e0 * double(space.row_length[g * rows + row]));
      nearest[i] = Nearest{double(kInfinity), 0x7FFFFFFF};
    }
    for (i64 block = 0; block < size; block += kOpenThreads) {
      const i64 k = block + threadIdx.x;
      const int state = k < size ? int(space.state[g * size + k]) : int(kNever);
      const float* codes = space.codes + (g * ceil_div(size, kTile) + k / kTile) * tile_floats + k % kTile;
      float score[kOpenRows];
#pragma unroll
      for (int i = 0; i < kOpenRows; ++i) score[i] = state == kScreened ? space.half_norm[g * size + k] : 0.0f;
      for (i64 d0 = 0; d0 < x.dim; d0 += kOpenDims) {
        const int dims = x.dim - d0 < kOpenDims ? int(x.dim - d0) : kOpenDims;
        const int i = threadIdx.x / kOpenDims, j = threadIdx.x % kOpenDims;  // 256 threads fetch 4 x 64 values
        sync_threads();
        i64 at = packed[0];
#pragma unroll
        for (int r = 1; r < kOpenRows; ++r) at = i == r ? packed[r] : at;
        tiles.x[i][j] = j < dims ? space.rows[at + (d0 + j) * kTile] : 0.0f;
        sync_threads();
        if (state == kScreened)
          for (int d = 0; d < dims; ++d) {
            const float code = codes[(d0 + d) * kTile];
#pragma unroll
            for (int r = 0; r < kOpenRows; ++r) score[r] = fma(tiles.x[r][d], code, score[r]);
          }
      }
      if (state == kNever) continue;
      const float reach = space.length[g * size + k];
      const double norm = p.metric == kCosine ? space.code_norm[g * size + k] : 1.0;
#pragma unroll
      for (int r = 0; r < kOpenRows; ++r) {
        // Written so that NaN, from rows whose products overflow, counts as near.
        const bool far = state == kScreened && fma(margin[r], reach, score[r]) > limit[r];
        if (!far) nearest[r].take(exact_score(p, g, base[r], k, norm), int(k));
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
