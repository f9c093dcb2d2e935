#include "ema.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "search.h"

namespace vqfast {
namespace {

constexpr int64_t kBlock = 1024;  // sorted rows per block; part of the result's definition, so never tuned by machine

// The first and the last code of a block may reach into the next blocks; their parts are added up in block order.
struct Edge {
  int32_t code = -1;
  std::vector<double> total;
};

void flush(const double* total, float* sums, int64_t code, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) sums[code * dim + d] = (float)total[d];
}

}  // namespace

void code_stats(const Rows& rows, const int64_t* index, int64_t codes, float* sums, int64_t* counts, const Parallel& parallel) {
  std::vector<int64_t> begin(codes + 1, 0);
  for (int64_t i = 0; i < rows.count; ++i)
    if (index[i] >= 0) ++begin[index[i] + 1];
  for (int64_t c = 0; c < codes; ++c) {
    counts[c] = begin[c + 1];
    begin[c + 1] += begin[c];
  }
  if (!sums) return;
  const int64_t dim = rows.dim, kept = begin[codes];
  std::vector<int64_t> at(begin.begin(), begin.end() - 1), order(kept);
  for (int64_t i = 0; i < rows.count; ++i)
    if (index[i] >= 0) order[at[index[i]]++] = i;
  parallel(codes, 1024, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      if (counts[c] == 0) memset(sums + c * dim, 0, dim * sizeof(float));
  });
  const int64_t blocks = (kept + kBlock - 1) / kBlock;
  std::vector<Edge> head(blocks), tail(blocks);
  parallel(blocks, 1, [&](int64_t first_block, int64_t last_block) {
    std::vector<double> total(dim);
    for (int64_t b = first_block; b < last_block; ++b) {
      const int64_t from = b * kBlock, to = std::min(kept, from + kBlock);
      for (int64_t i = from; i < to;) {
        const int64_t code = index[order[i]], end = std::min(to, begin[code + 1]);
        std::fill(total.begin(), total.end(), 0.0);
        const bool starts_here = begin[code] >= from, ends_here = begin[code + 1] <= to;
        for (; i < end; ++i) {
          if (i + 4 < to) __builtin_prefetch(rows.row(order[i + 4]));
          kernels().accumulate(total.data(), rows.row(order[i]), dim);
        }
        if (starts_here && ends_here) {
          flush(total.data(), sums, code, dim);
        } else {
          Edge& edge = starts_here ? tail[b] : head[b];
          edge.code = (int32_t)code;
          edge.total = total;
        }
      }
    }
  });
  Edge open;
  auto add = [&](Edge& part) {
    if (part.code < 0) return;
    if (open.code == part.code) {
      for (int64_t d = 0; d < dim; ++d) open.total[d] += part.total[d];
      return;
    }
    if (open.code >= 0) flush(open.total.data(), sums, open.code, dim);
    open = std::move(part);
  };
  for (int64_t b = 0; b < blocks; ++b) {
    add(head[b]);
    add(tail[b]);
  }
  if (open.code >= 0) flush(open.total.data(), sums, open.code, dim);
}

void ema_update(float* codebook, float* cluster_size, float* cluster_sum, const float* sums, const int64_t* counts,
                const bool* frozen, double decay, double eps, int64_t codes, int64_t dim, const Parallel& parallel) {
  int64_t rows = 0;
  for (int64_t c = 0; c < codes; ++c) rows += counts[c];
  if (rows == 0) return;
  const float keep = (float)decay, take = (float)(1.0 - decay), least = (float)eps;
  parallel(codes, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> mean(dim);
    for (int64_t c = begin; c < end; ++c) {
      cluster_size[c] = cluster_size[c] * keep + (float)counts[c] * take;
      float* total = cluster_sum + c * dim;
      bool finite = true;
      const float size = cluster_size[c];
      for (int64_t d = 0; d < dim; ++d) {
        total[d] = total[d] * keep + sums[c * dim + d] * take;
        mean[d] = total[d] / size;
        finite = finite && std::isfinite(mean[d]);
      }
      if (size >= least && finite && !(frozen && frozen[c])) memcpy(codebook + c * dim, mean.data(), dim * sizeof(float));
    }
  });
}

}  // namespace vqfast
