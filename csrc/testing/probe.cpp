// What a test wants to know of the CUDA backend on the executor, beside what the ops return.
#include "cuda/nearest.h"

// How many rows of x [N, D] float32 the screen leaves to float64, for codebook [K, D] float32, both contiguous.
extern "C" __attribute__((visibility("default"))) long vqfast_open_rows(const float* x, long n, const float* codebook, long k, long dim, int metric) {
  using namespace vq;
  NearestProblem p{};
  p.x = {x, kF32, 1, 1, n, dim, n * dim, n * dim, dim, 1};
  p.codebook = {codebook, kF32, 1, k, dim, k * dim, dim, 1};
  p.metric = metric;
  auto* distance = static_cast<float*>(std::malloc(size_t(n) * sizeof(float)));
  auto* indices = static_cast<i64*>(std::malloc(size_t(n) * sizeof(i64)));
  void* memory = std::malloc(nearest_space(p, nullptr, nullptr));
  p.distance = distance, p.indices = indices;
  nearest(p, memory, nullptr);
  NearestSpace space;
  nearest_space(p, memory, &space);
  const long open = long(space.open[0]);
  std::free(distance), std::free(indices), std::free(memory);
  return open;
}

// Bytes of scratch memory that nearest asks for.
extern "C" __attribute__((visibility("default"))) long vqfast_nearest_bytes(long n, long k, long dim) {
  vq::NearestProblem p{};
  p.x = {nullptr, vq::kF32, 1, 1, n, dim, n * dim, n * dim, dim, 1};
  p.codebook = {nullptr, vq::kF32, 1, k, dim, k * dim, dim, 1};
  return long(vq::nearest_space(p, nullptr, nullptr));
}
