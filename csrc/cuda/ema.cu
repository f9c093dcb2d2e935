#include "cuda/ema.cuh"

#include <utility>

#include "cuda/layout.h"

namespace vq {

namespace {

size_t layout_of(const StatsProblem& p, void* memory, SortSpace* space) {
  const i64 groups = p.x.groups, rows = p.x.rows(), codes = groups * (p.size + 1);
  SortSpace s;
  s.tiles = ceil_div(rows, kSortRows);
  s.chunks = rows / kChunkRows + p.size;
  Layout layout(memory);
  for (u32** array : {&s.key, &s.row, &s.next_key, &s.next_row}) layout.place(*array, groups * rows);
  layout.place(s.histogram, groups * kDigits * s.tiles);
  layout.place(s.totals, groups * kDigits);
  layout.place(s.start, codes);
  layout.place(s.chunk_start, codes);
  layout.place(s.partial, groups * s.chunks * p.x.dim);
  layout.place(s.chunk_count, groups * s.chunks);
  *space = s;
  return layout.bytes();
}

}  // namespace

size_t stats_space(const StatsProblem& p) {
  SortSpace space;
  return p.sums ? layout_of(p, nullptr, &space) : 0;
}

void code_stats(const StatsProblem& p, void* memory, cudaStream_t stream) {
  const i64 rows = p.x.rows(), codes = p.x.groups * p.size;
  const unsigned groups = unsigned(p.x.groups);
  if (codes == 0) return;
  if (!p.sums) {
    launch(stats_clear_kernel, dim3(unsigned(ceil_div(codes, 256))), dim3(256), 0, stream, p.counts, codes);
    if (rows) launch(stats_count_kernel, dim3(unsigned(ceil_div(rows, 256)), groups), dim3(256), 0, stream, p);
    return;
  }
  SortSpace s;
  layout_of(p, memory, &s);
  for (int pass = 0; rows && p.size >> (kDigitBits * pass); ++pass) {
    const dim3 tiles(unsigned(s.tiles), groups), block(kSortThreads);
    launch(sort_count_kernel, tiles, block, 0, stream, p, s, pass);
    launch(sort_scan_kernel, dim3(kDigits, groups), block, 0, stream, s);
    launch(sort_scatter_kernel, tiles, block, 0, stream, p, s, pass);
    std::swap(s.key, s.next_key), std::swap(s.row, s.next_row);
  }
  launch(stats_starts_kernel, dim3(unsigned(ceil_div(p.size + 1, 256)), groups), dim3(256), 0, stream, p, s);
  launch(stats_chunks_kernel, dim3(groups), dim3(kChunkScanThreads), 0, stream, p, s);
  launch(stats_sum_kernel, dim3(unsigned(ceil_div(s.chunks, kSumWarps)), groups), dim3(32 * kSumWarps), 0, stream, p, s);
  launch(stats_finish_kernel, dim3(unsigned(ceil_div(p.size, kSumWarps)), groups), dim3(32 * kSumWarps), 0, stream, p, s);
}

void ema_update(const EmaProblem& p, cudaStream_t stream) {
  const i64 codes = p.groups * p.size;
  if (codes == 0) return;
  launch(ema_any_row_kernel, dim3(unsigned(p.groups)), dim3(kAnyRowThreads), 0, stream, p);
  launch(ema_update_kernel, dim3(unsigned(ceil_div(codes, kSumWarps))), dim3(32 * kSumWarps), 0, stream, p);
}

}  // namespace vq
