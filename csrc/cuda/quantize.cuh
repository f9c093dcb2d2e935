// quantize: what follows the search in one training step: quantized rows, squared error, counts of rows that are not finite.
#pragma once

#include "cuda/quantize.h"

namespace vq {

constexpr int kQuantizeWarps = 4, kQuantizeRows = 32 * kQuantizeWarps;  // rows per block

struct QuantizeTiles {
  float x[kQuantizeWarps][32][33];
  double error[kQuantizeWarps];
  int bad[kQuantizeWarps];
};

struct QuantizePartial {
  double error;
  i64 bad;
};

// A warp owns 32 rows. x is read by rows where these are adjacent in memory (channels first), and turned in shared memory, so
// that reads and writes are both of whole sectors. Errors are summed in one fixed order. Bytes: x read and quantized written once.
__global__ void __launch_bounds__(kQuantizeRows) quantize_rows_kernel(QuantizeProblem q, QuantizePartial* partial) {
  VQ_SHARED(QuantizeTiles, tiles);
  const Rows& x = q.search.x;
  const Codes& c = q.search.codebook;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const i64 rows = x.rows(), g = blockIdx.y, first = i64(blockIdx.x) * kQuantizeRows + warp * 32;
  const i64 mine = first + lane;
  const i64 place = mine < rows ? x.place(g, mine) : 0, base = mine < rows ? x.base(g, mine) : 0;
  const i64 code = mine < rows ? q.search.indices[place] : -1;
  const bool bad = code >= 0 && q.search.distance[place] != q.search.distance[place];
  const u32 used = ballot(kFullWarp, code >= 0), nans = ballot(kFullWarp, bad);
  const int count = first >= rows ? 0 : rows - first < 32 ? int(rows - first) : 32;
  double error = 0;
  for (i64 d0 = 0; d0 < x.dim; d0 += 32) {
    const int dims = x.dim - d0 < 32 ? int(x.dim - d0) : 32;
    if (x.rows_adjacent()) {
      for (int j = 0; j < dims; ++j)
        if (mine < rows) tiles.x[warp][lane][j] = load_f32(x.data, x.dtype, base + (d0 + j) * x.stride_d);
      sync_warp();
    }
    for (int i = 0; i < count; ++i) {
      const i64 row_place = shfl(kFullWarp, place, i), row_base = shfl(kFullWarp, base, i), k = shfl(kFullWarp, code, i), d = d0 + lane;
      if (lane >= dims) continue;
      double value = 0;
      if (nans >> i & 1) {
        value = double(float_of(0x7FC00000u));
      } else if (used >> i & 1) {
        value = load_f64(c.data, c.dtype, c.base(g, k) + d * c.stride_d);
        const double from = x.rows_adjacent() ? double(tiles.x[warp][i][lane]) : load_f64(x.data, x.dtype, row_base + d * x.stride_d);
        error += (from - value) * (from - value);
      }
      store(q.quantized, x.dtype, row_place * x.dim + d, value);
    }
    sync_warp();
  }
  error = warp_sum(error);
  if (lane == 0) tiles.error[warp] = error, tiles.bad[warp] = popcount(nans);
  sync_threads();
  if (threadIdx.x != 0) return;
  QuantizePartial sum{0, 0};
  for (int w = 0; w < kQuantizeWarps; ++w) sum.error += tiles.error[w], sum.bad += tiles.bad[w];
  partial[i64(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

constexpr int kTotalThreads = 256;

struct QuantizeTotals {
  double error[kTotalThreads / 32];
  i64 bad[kTotalThreads / 32];
};

__global__ void __launch_bounds__(kTotalThreads) quantize_total_kernel(QuantizeProblem q, const QuantizePartial* partial, i64 count) {
  VQ_SHARED(QuantizeTotals, totals);
  double error = 0;
  i64 bad = 0;
  for (i64 i = threadIdx.x; i < count; i += kTotalThreads) error += partial[i].error, bad += partial[i].bad;
  error = warp_sum(error), bad = warp_sum(bad);
  if (threadIdx.x % 32 == 0) totals.error[threadIdx.x / 32] = error, totals.bad[threadIdx.x / 32] = bad;
  sync_threads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kTotalThreads / 32; ++w) error += totals.error[w], bad += totals.bad[w];
  q.sq_error[0] = q.sq_error[1] = error;
  *q.nonfinite = bad;
}

}  // namespace vq
