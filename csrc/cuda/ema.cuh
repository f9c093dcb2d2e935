// Code statistics, the same bits every time: rows are sorted by code with a stable radix sort, then summed in ascending order
// in blocks of 256 rows, block sums in ascending order. No float atomics; O(N + K D) memory; a code that owns half of all rows
// is as fast as any other, since its blocks run side by side.
#pragma once

#include "cuda/ema.h"

namespace vq {

constexpr int kDigitBits = 9, kDigits = 1 << kDigitBits;  // one pass sorts 511 codes, two sort 262,143
constexpr int kSortThreads = 256, kSortWarps = kSortThreads / 32, kSortItems = 8;
constexpr int kSortRows = kSortThreads * kSortItems;  // rows per block and pass
constexpr int kChunkRows = 256;

struct SortSpace {  // all per group
  u32 *key, *row;        // [G, R] sorted so far; key = code, or K for a row that is left out
  u32 *next_key, *next_row;
  int* histogram;        // [G, digits, tiles] rows of each digit in each tile, then where they start
  int* totals;           // [G, digits]
  i64* start;            // [G, K + 1] first sorted position of each code
  i64* chunk_start;      // [G, K + 1] first chunk of each code
  double* partial;       // [G, chunks, D] sums of the chunks of codes that have several
  i64* chunk_count;      // [G, chunks]
  i64 tiles, chunks;     // chunks: an upper bound, R / 256 + K
};

// The key of a row: its code, or K when it takes no part.
__device__ __forceinline__ u32 key_of(const StatsProblem& p, i64 g, i64 row) {
  const i64 k = p.indices.at(g, row);
  const bool in = k >= 0 && k < p.size && !(p.distance && p.distance[p.x.place(g, row)] != p.distance[p.x.place(g, row)]);
  return in ? u32(k) : u32(p.size);
}

struct SortItem {
  u32 key, row;
};

// Item i of a thread: each warp owns 256 neighbouring rows, in the order of (i, lane).
__device__ __forceinline__ i64 sort_position(int i) {
  return i64(blockIdx.x) * kSortRows + threadIdx.x / 32 * (32 * kSortItems) + i * 32 + threadIdx.x % 32;
}
__device__ __forceinline__ SortItem sort_item(const StatsProblem& p, const SortSpace& s, int pass, i64 g, i64 position) {
  if (pass == 0) return SortItem{key_of(p, g, position), u32(position)};
  const i64 at = g * p.x.rows() + position;
  return SortItem{s.key[at], s.row[at]};
}
__device__ __forceinline__ int digit_of(u32 key, int pass) { return int(key >> (kDigitBits * pass)) & (kDigits - 1); }

struct DigitCounts {
  int of[kDigits];
};

__global__ void __launch_bounds__(kSortThreads) sort_count_kernel(StatsProblem p, SortSpace s, int pass) {
  VQ_SHARED(DigitCounts, counts);
  const i64 g = blockIdx.y, rows = p.x.rows();
  for (int d = threadIdx.x; d < kDigits; d += kSortThreads) counts.of[d] = 0;
  sync_threads();
  for (int i = 0; i < kSortItems; ++i) {
    const i64 position = sort_position(i);
    if (position < rows) atomic_add(&counts.of[digit_of(sort_item(p, s, pass, g, position).key, pass)], 1);
  }
  sync_threads();
  for (int d = threadIdx.x; d < kDigits; d += kSortThreads) s.histogram[(g * kDigits + d) * s.tiles + blockIdx.x] = counts.of[d];
}

struct ScanSums {
  i64 of[32];
};

// Exclusive sum over the block, plus the total; sums must not be in use by another scan.
__device__ inline i64 block_scan(i64 value, ScanSums& sums, i64* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = int(blockDim.x) / 32;
  i64 inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const i64 below = shfl_up(kFullWarp, inclusive, step);
    if (lane >= step) inclusive += below;
  }
  if (lane == 31) sums.of[warp] = inclusive;
  sync_threads();
  i64 before = 0, all = 0;
  for (int w = 0; w < warps; ++w) {
    before += w < warp ? sums.of[w] : 0;
    all += sums.of[w];
  }
  sync_threads();
  *total = all;
  return before + inclusive - value;
}

// One block per digit: where each tile's rows start among the digit's rows.
__global__ void __launch_bounds__(kSortThreads) sort_scan_kernel(SortSpace s) {
  VQ_SHARED(ScanSums, sums);
  int* row = s.histogram + (i64(blockIdx.y) * kDigits + blockIdx.x) * s.tiles;
  i64 carry = 0;
  for (i64 start = 0; start < s.tiles; start += kSortThreads) {
    const i64 t = start + threadIdx.x;
    i64 total = 0;
    const i64 before = block_scan(t < s.tiles ? row[t] : 0, sums, &total);
    if (t < s.tiles) row[t] = int(carry + before);
    carry += total;
  }
  if (threadIdx.x == 0) s.totals[i64(blockIdx.y) * kDigits + blockIdx.x] = int(carry);
}

struct ScatterPlaces {
  u32 of[kSortWarps][kDigits];  // first rows counted per warp, then where the warp's next row of that digit goes
  ScanSums sums;
};

__global__ void __launch_bounds__(kSortThreads) sort_scatter_kernel(StatsProblem p, SortSpace s, int pass) {
  VQ_SHARED(ScatterPlaces, places);
  const i64 g = blockIdx.y, rows = p.x.rows();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < kSortWarps * kDigits; i += kSortThreads) places.of[i / kDigits][i % kDigits] = 0;
  sync_threads();
  SortItem items[kSortItems];
  u32 peers[kSortItems];
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    const i64 position = sort_position(i);
    const bool in = position < rows;
    if (in) items[i] = sort_item(p, s, pass, g, position);
    const int digit = in ? digit_of(items[i].key, pass) : kDigits;
    peers[i] = match_any(kFullWarp, u32(digit));
    if (in && popcount(peers[i] & ((1u << lane) - 1)) == 0) places.of[warp][digit] += u32(popcount(peers[i]));
    sync_warp();
  }
  sync_threads();
  // Two neighbouring digits per thread: where the digit starts, plus this tile's share, plus the warps before.
  i64 total = 0;
  const int* totals = s.totals + g * kDigits;
  const int d0 = 2 * int(threadIdx.x);
  i64 next = block_scan(i64(totals[d0]) + totals[d0 + 1], places.sums, &total);
  for (int d = d0; d < d0 + 2; ++d) {
    i64 place = next + s.histogram[(g * kDigits + d) * s.tiles + blockIdx.x];
    for (int w = 0; w < kSortWarps; ++w) {
      const u32 count = places.of[w][d];
      places.of[w][d] = u32(place);
      place += count;
    }
    next += totals[d];
  }
  sync_threads();
  u32* key_out = s.next_key + g * rows;
  u32* row_out = s.next_row + g * rows;
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    const bool in = sort_position(i) < rows;
    const int digit = in ? digit_of(items[i].key, pass) : 0, rank = popcount(peers[i] & ((1u << lane) - 1));
    if (in) {
      const i64 at = i64(places.of[warp][digit]) + rank;
      key_out[at] = items[i].key, row_out[at] = items[i].row;
    }
    sync_warp();
    if (in && rank == 0) places.of[warp][digit] += u32(popcount(peers[i]));
    sync_warp();
  }
}
static_assert(kDigits == 2 * kSortThreads, "a thread owns two digits");

// ---- sums -------------------------------------------------------------------------------------------------------------------

// start[k]: the first sorted position whose key is at least k, by bisection.
__global__ void __launch_bounds__(256) stats_starts_kernel(StatsProblem p, SortSpace s) {
  const i64 k = i64(blockIdx.x) * 256 + threadIdx.x, g = blockIdx.y, rows = p.x.rows();
  if (k > p.size) return;
  const u32* key = s.key + g * rows;
  i64 low = 0, high = rows;
  while (low < high) {
    const i64 middle = (low + high) / 2;
    if (i64(key[middle]) < k)
      low = middle + 1;
    else
      high = middle;
  }
  s.start[g * (p.size + 1) + k] = low;
}

constexpr int kChunkScanThreads = 1024;

// chunk_start: how many chunks of 256 rows the codes before k have. One block per group.
__global__ void __launch_bounds__(kChunkScanThreads) stats_chunks_kernel(StatsProblem p, SortSpace s) {
  VQ_SHARED(ScanSums, sums);
  const i64* start = s.start + i64(blockIdx.x) * (p.size + 1);
  i64* chunk_start = s.chunk_start + i64(blockIdx.x) * (p.size + 1);
  i64 carry = 0;
  for (i64 first = 0; first <= p.size; first += kChunkScanThreads) {
    const i64 k = first + threadIdx.x;
    i64 total = 0;
    const i64 before = block_scan(k < p.size ? ceil_div(start[k + 1] - start[k], kChunkRows) : 0, sums, &total);
    if (k <= p.size) chunk_start[k] = carry + before;
    carry += total;
  }
}

constexpr int kSumWarps = 8;

// Bit i: sorted row i of these (at most 32) is finite. With a distance at hand the sort has left the others out already.
__device__ inline u32 finite_rows(const StatsProblem& p, i64 g, const u32* row, int count) {
  const u32 all = count == 32 ? kFullWarp : (1u << count) - 1;
  if (p.distance) return all;
  u32 finite = 0;
  for (int i = 0; i < count; ++i) {
    const i64 base = p.x.base(g, row[i]);
    bool mine = true;
    for (i64 d = threadIdx.x % 32; d < p.x.dim; d += 32) mine = mine && is_finite(load_f64(p.x.data, p.x.dtype, base + d * p.x.stride_d));
    finite |= u32(ballot(kFullWarp, !mine) == 0) << i;
  }
  return finite;
}

constexpr int kSumDims = 4;  // components that a lane sums at a time

// A warp owns a chunk: up to 256 rows of one code, in ascending order, summed in float64.
__global__ void __launch_bounds__(32 * kSumWarps, 3) stats_sum_kernel(StatsProblem p, SortSpace s) {
  const i64 g = blockIdx.y, chunk = i64(blockIdx.x) * kSumWarps + threadIdx.x / 32, rows = p.x.rows(), dim = p.x.dim;
  const int lane = threadIdx.x % 32;
  const i64* chunk_start = s.chunk_start + g * (p.size + 1);
  if (chunk >= chunk_start[p.size]) return;
  i64 low = 0, high = p.size - 1;  // the last code that starts at or before this chunk
  while (low < high) {
    const i64 middle = (low + high + 1) / 2;
    if (chunk_start[middle] <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  const i64 k = low, *start = s.start + g * (p.size + 1);
  const i64 begin = start[k] + (chunk - chunk_start[k]) * kChunkRows;
  const i64 end = begin + kChunkRows < start[k + 1] ? begin + kChunkRows : start[k + 1];
  const u32* row = s.row + g * rows;
  const bool only = chunk_start[k + 1] - chunk_start[k] == 1;

  i64 count = 0;
  for (i64 d0 = 0; d0 < dim; d0 += 32 * kSumDims) {
    double sum[kSumDims] = {};
    count = 0;
    for (i64 i = begin; i < end; i += 32) {
      const u32 finite = finite_rows(p, g, row + i, end - i < 32 ? int(end - i) : 32);
      count += popcount(finite);
      for (u32 bits = finite; bits; bits &= bits - 1) {
        const i64 base = p.x.base(g, row[i + popcount((bits & (0u - bits)) - 1)]);
#pragma unroll
        for (int j = 0; j < kSumDims; ++j) {
          const i64 d = d0 + 32 * j + lane;
          if (d < dim) sum[j] = add(sum[j], load_f64(p.x.data, p.x.dtype, base + d * p.x.stride_d));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kSumDims; ++j) {
      const i64 d = d0 + 32 * j + lane;
      if (d >= dim) continue;
      if (only)
        p.sums[(g * p.size + k) * dim + d] = float(sum[j]);
      else
        s.partial[(g * s.chunks + chunk) * dim + d] = sum[j];
    }
  }
  if (lane != 0) return;
  if (only)
    p.counts[g * p.size + k] = count;
  else
    s.chunk_count[g * s.chunks + chunk] = count;
}

// A warp owns a code that has no chunk, or several.
__global__ void __launch_bounds__(32 * kSumWarps) stats_finish_kernel(StatsProblem p, SortSpace s) {
  const i64 g = blockIdx.y, k = i64(blockIdx.x) * kSumWarps + threadIdx.x / 32, dim = p.x.dim;
  if (k >= p.size) return;
  const i64 *chunk_start = s.chunk_start + g * (p.size + 1) + k, first = chunk_start[0], last = chunk_start[1];
  if (last - first == 1) return;
  for (i64 d = threadIdx.x % 32; d < dim; d += 32) {
    double sum = 0;
    for (i64 c = first; c < last; ++c) sum = add(sum, s.partial[(g * s.chunks + c) * dim + d]);
    p.sums[(g * p.size + k) * dim + d] = float(sum);
  }
  if (threadIdx.x % 32 != 0) return;
  i64 count = 0;
  for (i64 c = first; c < last; ++c) count += s.chunk_count[g * s.chunks + c];
  p.counts[g * p.size + k] = count;
}

// ---- counts alone: integer atomics, which no order can change ----------------------------------------------------------------

__global__ void stats_clear_kernel(i64* counts, i64 size) {
  const i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) counts[i] = 0;
}

__global__ void __launch_bounds__(256) stats_count_kernel(StatsProblem p) {
  const i64 row = i64(blockIdx.x) * 256 + threadIdx.x, g = blockIdx.y;
  const u32 key = row < p.x.rows() ? key_of(p, g, row) : u32(p.size);
  const u32 peers = match_any(kFullWarp, key);  // one atomic per code and warp, so that a hot code does not queue
  if (key == u32(p.size) || (peers & ((1u << threadIdx.x % 32) - 1)) != 0) return;
  atomic_add(reinterpret_cast<unsigned long long*>(p.counts + g * p.size + key), static_cast<unsigned long long>(popcount(peers)));
}

// ---- moving average: a warp owns a code ---------------------------------------------------------------------------------------

struct AnyRow {
  int threads;  // that met a code with rows
};
constexpr int kAnyRowThreads = 1024;

__global__ void __launch_bounds__(kAnyRowThreads) ema_any_row_kernel(EmaProblem p) {
  VQ_SHARED(AnyRow, any);
  const i64 g = blockIdx.x;
  if (threadIdx.x == 0) any.threads = 0;
  sync_threads();
  bool own = false;
  for (i64 k = threadIdx.x; k < p.size; k += kAnyRowThreads) own = own || p.counts[g * p.size + k] > 0;
  if (own) atomic_add(&any.threads, 1);
  sync_threads();
  if (threadIdx.x == 0) p.any_row[g] = any.threads;
}

// size <- decay size + (1 - decay) n; sum <- decay sum + (1 - decay) s; code <- sum / size, unless size < eps, the code is
// frozen, or the mean is not finite. Nothing of a code whose sum would not be finite changes, and nothing in a group without rows.
// Computed in float64, stored in the state's dtype; the mean is taken of what was stored.
__global__ void __launch_bounds__(32 * kSumWarps) ema_update_kernel(EmaProblem p) {
  const i64 k = i64(blockIdx.x) * kSumWarps + threadIdx.x / 32;  // of G K codes
  const int lane = threadIdx.x % 32;
  if (k >= p.groups * p.size || !p.any_row[k / p.size]) return;
  const double rest = 1.0 - p.decay;
  const double moved = p.decay * load_f64(p.cluster_size, p.size_dtype, k) + rest * double(p.counts[k]);
  const double size = p.size_dtype == kF64 ? moved : double(float(moved));
  const double eps = p.size_dtype == kF64 ? p.eps : double(float(p.eps));
  const auto sum_at = [&](i64 at) { return p.decay * load_f64(p.cluster_sum, p.sum_dtype, at) + rest * load_f64(p.sums, p.sums_dtype, at); };
  bool finite = true;
  for (i64 d = lane; d < p.dim; d += 32) {
    const double sum = sum_at(k * p.dim + d);
    finite = finite && (p.sum_dtype == kF64 ? is_finite(sum) : is_finite(float(sum)));
  }
  if (ballot(kFullWarp, !finite) != 0) return;
  for (i64 d = lane; d < p.dim; d += 32) {
    const i64 at = k * p.dim + d;
    store(p.cluster_sum, p.sum_dtype, at, sum_at(at));
    const double mean = load_f64(p.cluster_sum, p.sum_dtype, at) / (size > eps ? size : eps);
    finite = finite && (p.codebook_dtype == kF64 ? is_finite(mean) : is_finite(float(mean)));
  }
  const bool moves = ballot(kFullWarp, !finite) == 0 && size >= eps && !(p.frozen && p.frozen[k]);
  for (i64 d = lane; moves && d < p.dim; d += 32) {
    const i64 at = k * p.dim + d;
    store(p.codebook, p.codebook_dtype, at, load_f64(p.cluster_sum, p.sum_dtype, at) / (size > eps ? size : eps));
  }
  if (lane == 0) store(p.cluster_size, p.size_dtype, k, moved);
}

}  // namespace vq
