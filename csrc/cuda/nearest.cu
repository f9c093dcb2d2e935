// Launches nearest, and chooses its screen. Nothing here waits for the device or allocates: the caller brings one block of memory.
#include "cuda/nearest.cuh"

#include "cuda/layout.h"
#include "cuda/nearest_few.h"

namespace vq {

namespace {

i64 power_of_two_from(i64 value) {
  i64 power = 1;
  while (power < value) power *= 2;
  return power;
}

// How many parts the codes are split into, so that few rows still fill the device: two blocks per multiprocessor.
int splits_for(const NearestProblem& p) {
  const i64 tiles = ceil_div(p.x.rows(), kTile) * p.x.groups, code_tiles = ceil_div(p.codebook.size, kTile);
  const i64 wanted = tiles ? i64(2) * multiprocessors() / tiles : 1;
  const i64 most = code_tiles < 64 ? code_tiles : 64;
  return int(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace

size_t nearest_layout(const NearestProblem& p, void* memory, NearestSpace* space) {
  const i64 groups = p.codebook.groups, codes = groups * p.codebook.size, rows = groups * p.x.rows();
  NearestSpace s{};
  plan_hopper(p, &s);
  s.splits = s.steps ? 1 : splits_for(p);  // the Hopper screen's own splits meet before settling
  s.padded_dim = ceil_div(p.x.dim, kTileDims) * kTileDims;
  s.buckets = power_of_two_from(2 * p.codebook.size);
  Layout layout(memory);
  layout.place(s.centre, groups * p.x.dim);
  layout.place(s.codes, groups * ceil_div(p.codebook.size, kTile) * kTile * s.padded_dim);
  layout.place(s.rows, groups * ceil_div(p.x.rows(), kTile) * kTile * s.padded_dim);
  layout.place(s.half_norm, codes);
  layout.place(s.length, codes);
  layout.place(s.code_norm, p.metric == kCosine ? codes : 0);
  layout.place(s.state, codes);
  layout.place(s.bucket, groups * s.buckets);
  layout.place(s.first_code, groups);
  layout.place(s.wild_codes, groups);
  layout.place(s.open, groups);
  layout.place(s.row_length, rows);
  layout.place(s.best, s.splits * rows);
  layout.place(s.second, s.splits * rows);
  layout.place(s.best_code, s.splits * rows);
  layout.place(s.open_row, rows);
  layout.place(s.open_limit, rows);
  if (s.steps) {
    layout.place(s.longest, groups);
    layout.place(s.code_residual, groups);
    layout.place(s.code_halves, groups * ceil_div(p.codebook.size, kTile) * s.steps * (16 * kTile / 2));
    layout.place(s.row_halves, groups * ceil_div(p.x.rows(), 64) * s.steps * (16 * 64 / 2));
    layout.place(s.row_error, rows);
    layout.place(s.row_bias, rows);
    layout.place(s.row_scale, rows);
    layout.place(s.entries, s.half_splits * rows * 16);
  }
  *space = s;
  return layout.bytes();
}

size_t nearest_space(const NearestProblem& p) {
  FewSpace few;
  NearestSpace space;
  return few_rows(p) ? few_layout(p, nullptr, &few) : nearest_layout(p, nullptr, &space);
}

void nearest(const NearestProblem& p, void* memory, cudaStream_t stream) {
  const i64 rows = p.x.rows();
  if (rows == 0 || p.x.groups == 0) return;
  if (few_rows(p)) return nearest_few(p, memory, stream);
  NearestSpace space;
  nearest_layout(p, memory, &space);
  const double e0 = screen_bound(p.x.dim);
  const unsigned groups = unsigned(p.x.groups);
  const i64 buckets = groups * space.buckets;
  const dim3 code_grid(unsigned(ceil_div(p.codebook.size, kCodeWarps)), groups), code_block(32 * kCodeWarps);
  const dim3 row_grid(unsigned(ceil_div(rows, kRowBlock)), groups);
  launch(nearest_clear_kernel, dim3(unsigned(ceil_div(buckets, 256))), dim3(256), 0, stream, space, p.x.groups);
  launch(nearest_codes_kernel, code_grid, code_block, 0, stream, p.codebook, p.metric, space);
  launch(nearest_centre_kernel, dim3(unsigned(ceil_div(p.x.dim, 32)), groups), dim3(32 * kSampledGroups), 0, stream, p.codebook, p.metric, space);
  launch(nearest_pack_kernel, code_grid, code_block, 0, stream, p.codebook, p.metric, e0, space);
  launch(nearest_rows_kernel, row_grid, dim3(kRowBlock), 0, stream, p, space);
  if (space.steps)
    screen_on_hopper(p, e0, space, stream);
  else
    launch(nearest_screen_kernel, dim3(unsigned(ceil_div(rows, kTile)), unsigned(space.splits), groups), dim3(kScreenThreads), 0, stream, p, e0, space);
  launch(nearest_settle_kernel, row_grid, dim3(kRowBlock), 0, stream, p, e0, space);
  launch(nearest_rescan_kernel, dim3(unsigned(4 * multiprocessors()), groups), dim3(kOpenThreads), 0, stream, p, e0, space);
}

}  // namespace vq
