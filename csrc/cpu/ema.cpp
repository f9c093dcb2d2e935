#include "ema.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "ema_level.h"
#include "search.h"

namespace vqfast {
namespace {

constexpr int64_t kBlock = 1024;  // sorted rows per block; part of the result's definition, so never tuned by machine

// The first and the last code of a block may reach into the next blocks; their parts are added up in block order.
struct Edge {
  int32_t code = -1;
  std::vector<double> total;
};

// Rows of each code, in order: code c has order[begin[c]] .. order[begin[c + 1] - 1].
struct Sorted {
  std::vector<int64_t> begin;
  std::unique_ptr<int64_t[]> order;
};

// A counting sort. False when an index lies outside -1..codes-1.
bool sort_rows(const int64_t* index, int64_t rows, int64_t codes, Sorted* sorted, int64_t* counts) {
  std::vector<int64_t>& begin = sorted->begin;
  begin.assign(codes + 1, 0);
  bool in_range = true;
  for (int64_t i = 0; i < rows; ++i) {
    if ((uint64_t)index[i] < (uint64_t)codes) ++begin[index[i]];
    else in_range = in_range && index[i] == -1;
  }
  if (!in_range) return false;
  int64_t kept = 0;
  for (int64_t c = 0; c < codes; ++c) {
    counts[c] = begin[c];
    begin[c] = kept;
    kept += counts[c];
  }
  sorted->order.reset(new int64_t[kept + 1]);
  for (int64_t i = 0; i < rows; ++i)
    if (index[i] >= 0) sorted->order[begin[index[i]]++] = i;
  for (int64_t c = codes; c > 0; --c) begin[c] = begin[c - 1];  // each had moved to the next one's place
  begin[0] = 0;
  return true;
}

// Sorted rows [from, to): whole codes go to `sums`, the others to the block's edges. False when a whole code's sum is not finite.
bool sum_block(const Rows& rows, const Sorted& sorted, int64_t from, int64_t to, float* sums, Edge* head, Edge* tail) {
  const auto sum = ema_kernels().sum_rows;
  const std::vector<int64_t>& begin = sorted.begin;
  const int64_t* order = sorted.order.get();
  const int64_t dim = rows.dim, kept = begin.back();
  bool finite = true;
  int64_t code = std::upper_bound(begin.begin(), begin.end(), from) - begin.begin() - 1;
  for (int64_t i = from; i < to; ++code) {
    const int64_t end = std::min(to, begin[code + 1]), n = end - i;
    if (n == 0) continue;
    const bool starts_here = begin[code] >= from, whole = starts_here && begin[code + 1] <= to;
    if (whole) {
      finite = sum(rows.data, rows.ld, order + i, n, kept - i, dim, nullptr, sums + code * dim) && finite;
    } else {
      Edge* edge = starts_here ? tail : head;
      edge->code = (int32_t)code;
      edge->total.resize(dim);
      sum(rows.data, rows.ld, order + i, n, kept - i, dim, edge->total.data(), nullptr);
    }
    i = end;
  }
  return finite;
}

// Adds up what lies on both sides of the borders of blocks. False when a sum is not finite.
bool join_edges(std::vector<Edge>& head, std::vector<Edge>& tail, int64_t dim, float* sums) {
  FloatMode mode;
  Edge open;
  bool finite = true;
  auto close = [&] {
    for (int64_t d = 0; open.code >= 0 && d < dim; ++d) {
      sums[open.code * dim + d] = (float)open.total[d];
      finite = finite && std::isfinite(open.total[d]);
    }
  };
  auto add = [&](Edge& part) {
    if (part.code < 0) return;
    if (open.code == part.code) {
      for (int64_t d = 0; d < dim; ++d) open.total[d] += part.total[d];
      return;
    }
    close();
    open = std::move(part);
  };
  for (size_t b = 0; b < head.size(); ++b) {
    add(head[b]);
    add(tail[b]);
  }
  close();
  return finite;
}

}  // namespace

const EmaKernels& ema_kernels() {
#if defined(__x86_64__) && !defined(VQFAST_NO_X86)
  switch (level()) {
    case 3:
    case 2: return ema_kernels_avx512();
    case 1: return ema_kernels_avx2();
  }
#endif
  return ema_kernels_scalar();
}

Stats code_stats(const Rows& rows, const int64_t* index, int64_t codes, float* sums, int64_t* counts, const Parallel& parallel) {
  Sorted sorted;
  if (!sort_rows(index, rows.count, codes, &sorted, counts)) return Stats::kOutOfRange;
  if (!sums) return Stats::kDone;
  const int64_t dim = rows.dim, kept = sorted.begin[codes];
  parallel(codes, 1024, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      if (counts[c] == 0) memset(sums + c * dim, 0, dim * sizeof(float));
  });
  const int64_t blocks = (kept + kBlock - 1) / kBlock;
  std::vector<Edge> head(blocks), tail(blocks);
  std::atomic<bool> finite{true};
  parallel(blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      if (!sum_block(rows, sorted, b * kBlock, std::min(kept, (b + 1) * kBlock), sums, &head[b], &tail[b]))
        finite.store(false, std::memory_order_relaxed);
  });
  const bool edges_finite = join_edges(head, tail, dim, sums);
  return finite.load() && edges_finite ? Stats::kDone : Stats::kNotFinite;
}

void ema_update(float* codebook, float* cluster_size, float* cluster_sum, const float* sums, const int64_t* counts,
                const bool* frozen, double decay, double eps, int64_t codes, int64_t dim, const Parallel& parallel) {
  int64_t rows = 0;
  for (int64_t c = 0; c < codes; ++c) rows += counts[c];
  if (rows == 0) return;
  FloatMode mode;
  const float keep = (float)decay, take = (float)(1.0 - decay), least = (float)eps;
  parallel(codes, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> fresh(dim);
    for (int64_t c = begin; c < end; ++c) {
      float* sum = cluster_sum + c * dim;
      if (!ema_kernels().blend(sum, sums + c * dim, fresh.data(), keep, take, dim)) continue;  // it would never be finite again
      memcpy(sum, fresh.data(), dim * sizeof(float));
      const float size = cluster_size[c] = cluster_size[c] * keep + (float)counts[c] * take;
      if (!(size >= least) || (frozen && frozen[c]) || !ema_kernels().divide(sum, fresh.data(), size, dim)) continue;
      memcpy(codebook + c * dim, fresh.data(), dim * sizeof(float));
    }
  });
}

}  // namespace vqfast
