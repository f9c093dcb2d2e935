// What a test wants to know of the CUDA backend on the executor, beside what the ops return.
#include "cuda/nearest_few.h"

namespace {

using namespace vq;

// Runs nearest on x [N, D] and codebook [K, D], float32, both contiguous, and asks `count` about its scratch memory.
template <class Count>
long after_search(const float* x, long n, const float* codebook, long k, long dim, int metric, Count count) {
  NearestProblem p{};
  p.x = {x, kF32, 1, 1, n, dim, n * dim, n * dim, dim, 1};
  p.codebook = {codebook, kF32, 1, k, dim, k * dim, dim, 1};
  p.metric = metric;
  std::vector<float> distance(static_cast<size_t>(n));
  std::vector<i64> indices(static_cast<size_t>(n));
  p.distance = distance.data(), p.indices = indices.data();
  void* memory = std::malloc(nearest_space(p));
  nearest(p, memory, nullptr);
  const long found = count(p, memory);
  std::free(memory);
  return found;
}

}  // namespace

// How many rows the screen leaves to float64.
extern "C" __attribute__((visibility("default"))) long vqfast_open_rows(const float* x, long n, const float* codebook, long k, long dim, int metric) {
  return after_search(x, n, codebook, k, dim, metric, [](const NearestProblem& p, void* memory) {
    NearestSpace space;
    nearest_layout(p, memory, &space);
    return long(space.open[0]);
  });
}

// How many tiles of 256 codes the search for few rows evaluates whole, of all its rows; -1: it does not run for this problem.
extern "C" __attribute__((visibility("default"))) long vqfast_whole_tiles(const float* x, long n, const float* codebook, long k, long dim, int metric) {
  return after_search(x, n, codebook, k, dim, metric, [](const NearestProblem& p, void* memory) {
    if (!few_rows(p)) return -1l;
    FewSpace space;
    few_layout(p, memory, &space);
    long whole = 0;
    for (i64 i = 0; i < space.code_tiles * p.x.rows(); ++i) whole += space.near[i].hides_codes_up_to(space.limit[i % p.x.rows()]);
    return whole;
  });
}

// Bytes of scratch memory that nearest asks for.
extern "C" __attribute__((visibility("default"))) long vqfast_nearest_bytes(long n, long k, long dim) {
  vq::NearestProblem p{};
  p.x = {nullptr, vq::kF32, 1, 1, n, dim, n * dim, n * dim, dim, 1};
  p.codebook = {nullptr, vq::kF32, 1, k, dim, k * dim, dim, 1};
  return long(vq::nearest_space(p));
}
