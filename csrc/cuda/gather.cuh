// gather: rows of a codebook. Words are copied as they are, so every dtype keeps its bits.
#pragma once

#include "cuda/gather.h"

namespace vq {

constexpr int kGatherThreads = 256;

struct alignas(16) Word16 {
  u64 part[2];
};

// `lanes` neighbouring threads own one row of `words` words; strides in words. An index outside 0..K-1, -1 above all, reads
// nothing and gives zeros. Bytes: each row is written once; codes come from L2.
template <class Word>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(GatherProblem p, Codes c, i64 words, int lanes) {
  const i64 rows = p.indices.rows(), g = blockIdx.y;
  const i64 row = i64(blockIdx.x) * (kGatherThreads / lanes) + threadIdx.x / lanes;
  if (row >= rows) return;
  const i64 k = p.indices.at(g, row);
  const BatchRow at(row, p.indices.count);
  const bool inside = k >= 0 && k < c.size;
  const Word* from = static_cast<const Word*>(c.data) + (inside ? c.base(g, k) : 0);
  Word* to = static_cast<Word*>(p.out) + ((at.batch * p.indices.groups + g) * p.indices.count + at.position) * words;
  for (i64 w = threadIdx.x % lanes; w < words; w += lanes) to[w] = inside ? from[w * c.stride_d] : Word{};
}

}  // namespace vq
