#include "cuda/quantize.cuh"

#include "cuda/layout.h"

namespace vq {

namespace {

struct QuantizeSpace {
  char *search, *stats;
  float* distance;
  QuantizePartial* partial;
  i64 blocks;
};

StatsProblem stats_of(const QuantizeProblem& q, const float* distance) {
  const Rows& x = q.search.x;
  const Index indices{q.search.indices, x.batch, x.groups, x.count, x.groups * x.count, x.count, 1};
  return StatsProblem{x, indices, distance, q.search.codebook.size, q.sums, q.counts};
}

size_t layout_of(const QuantizeProblem& q, void* memory, QuantizeSpace* space) {
  QuantizeSpace s;
  s.blocks = ceil_div(q.search.x.rows(), kQuantizeRows);
  Layout layout(memory);
  layout.place(s.search, i64(nearest_space(q.search)));
  layout.place(s.stats, i64(stats_space(stats_of(q, nullptr))));
  layout.place(s.distance, q.search.x.rows() * q.search.x.groups);
  layout.place(s.partial, s.blocks * q.search.x.groups);
  *space = s;
  return layout.bytes();
}

}  // namespace

size_t quantize_space(const QuantizeProblem& q) {
  QuantizeSpace space;
  return layout_of(q, nullptr, &space);
}

void quantize(const QuantizeProblem& problem, void* memory, cudaStream_t stream) {
  QuantizeProblem q = problem;
  QuantizeSpace s;
  layout_of(q, memory, &s);
  q.search.distance = s.distance;
  nearest(q.search, s.search, stream);
  const unsigned groups = unsigned(q.search.x.groups);
  if (s.blocks && groups) launch(quantize_rows_kernel, dim3(unsigned(s.blocks), groups), dim3(kQuantizeRows), 0, stream, q, s.partial);
  launch(quantize_total_kernel, dim3(1), dim3(kTotalThreads), 0, stream, q, (const QuantizePartial*)s.partial, s.blocks * groups);
  code_stats(stats_of(q, s.distance), s.stats, stream);
}

}  // namespace vq
