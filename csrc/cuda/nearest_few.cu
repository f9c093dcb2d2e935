// Launches the search for few rows.
#include "cuda/nearest_few.cuh"

#include <atomic>

#include "cuda/layout.h"

namespace vq {

namespace {

// Above this many rows the blocks of the other screens fill a device by themselves.
constexpr i64 kMostFewRows = 4096;

// Off until somebody allows it: this screen stands on how tensor cores add, which no GPU has confirmed yet.
std::atomic<bool> allowed{false};

}  // namespace

// For tests and benchmarks, as vqfast_cuda_hopper_allow. Returns what held before.
extern "C" __attribute__((visibility("default"))) int vqfast_cuda_few_rows_allow(int allow) { return allowed.exchange(allow != 0); }

bool few_rows(const NearestProblem& p) {
  return allowed && p.metric != kCosine && p.x.rows() * p.x.groups <= kMostFewRows && p.x.dim <= kFewDim &&
         ceil_div(p.codebook.size, kFewCodes) <= 65535;
}

size_t few_layout(const NearestProblem& p, void* memory, FewSpace* space) {
  const i64 groups = p.codebook.groups;
  FewSpace s{};
  s.code_tiles = ceil_div(p.codebook.size, kFewCodes), s.row_tiles = ceil_div(p.x.rows(), kFewRows), s.padded_dim = ceil_div(p.x.dim, 32) * 32;
  Layout layout(memory);
  layout.place(s.codes, groups * s.code_tiles * s.tile_words(kFewCodes));
  layout.place(s.rows, groups * s.row_tiles * s.tile_words(kFewRows));
  layout.place(s.code, groups * p.codebook.size);
  layout.place(s.row, groups * p.x.rows());
  layout.place(s.near, s.code_tiles * groups * p.x.rows());
  layout.place(s.limit, groups * p.x.rows());
  *space = s;
  return layout.bytes();
}

void nearest_few(const NearestProblem& p, void* memory, cudaStream_t stream) {
  FewSpace s;
  few_layout(p, memory, &s);
  const double e0 = screen_bound(p.x.dim + 8);  // 8 more roundings: those of lower_bound
  const unsigned groups = unsigned(p.x.groups);
  const i64 vectors = p.codebook.size + p.x.rows();
  launch(nearest_few_prepare_kernel, dim3(unsigned(ceil_div(vectors, kFewWarps)), groups), dim3(32 * kFewWarps), 0, stream, p, s, e0);
  const dim3 tiles(unsigned(s.row_tiles), unsigned(s.code_tiles), groups);
  launch(nearest_few_screen_kernel, tiles, dim3(kFewThreads), sizeof(FewTiles), stream, p, s);
  launch(nearest_few_settle_kernel, dim3(unsigned(ceil_div(p.x.rows(), kFewWarps)), groups), dim3(32 * kFewWarps), 0, stream, p, s, e0);
}

}  // namespace vq
