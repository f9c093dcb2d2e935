// Launches the Hopper screen and what prepares and refines it.
#include "cuda/nearest_hopper.cuh"

#include <atomic>

namespace vq {

namespace {

template <int kSteps>
void screen(const NearestProblem& p, const NearestSpace& space, cudaStream_t stream) {
  using Shape = HopperShape<kSteps>;
  const dim3 grid(unsigned(ceil_div(p.x.rows(), Shape::kRows)), unsigned(space.half_splits), unsigned(p.x.groups));
  launch(nearest_hopper_kernel<kSteps>, grid, dim3(kHopperThreads), Shape::kBytes, stream, p, space);
}

// Off until somebody allows it: this screen stands on how wgmma reads shared memory and adds, which no GPU has confirmed yet.
std::atomic<bool> allowed{false};

// A build without sm_90a leaves the kernel empty, its barriers in shared memory too. All Hopper devices run the same build.
bool built_for_hopper() {
  static const bool built = static_shared_bytes(nearest_hopper_kernel<5>) > 0;
  return built;
}

int rows_per_block(int steps) { return steps <= 9 ? HopperShape<9>::kRows : HopperShape<17>::kRows; }

}  // namespace

// For tests and benchmarks: whether devices that have wgmma may use it. Returns what held before. Not to be called while an op is
// being launched, since scratch memory is laid out by it.
extern "C" __attribute__((visibility("default"))) int vqfast_cuda_hopper_allow(int allow) { return allowed.exchange(allow != 0); }

void plan_hopper(const NearestProblem& p, NearestSpace* s) {
  s->steps = s->half_splits = s->id_bits = 0;
  if (!allowed || !hopper() || !built_for_hopper() || p.x.dim > 16 * (kHalfMaxSteps - 1)) return;
  s->steps = p.x.dim <= 64 ? 5 : p.x.dim <= 128 ? 9 : kHalfMaxSteps;
  const i64 tiles = ceil_div(p.codebook.size, kHalfCodes), blocks = ceil_div(p.x.rows(), rows_per_block(s->steps)) * p.x.groups;
  // Few rows: the codes are split until every multiprocessor has work. Very many codes: until 12 bits hold a group's number.
  i64 splits = blocks ? multiprocessors() / blocks : 1;
  if (splits < ceil_div(tiles, 2048)) splits = ceil_div(tiles, 2048);
  s->half_splits = int(splits < 1 ? 1 : splits < tiles ? splits : tiles);
  while ((i64(1) << s->id_bits) < 2 * ceil_div(tiles, s->half_splits)) ++s->id_bits;
}

void screen_on_hopper(const NearestProblem& p, double e0, const NearestSpace& space, cudaStream_t stream) {
  const unsigned groups = unsigned(p.x.groups);
  launch(nearest_code_halves_kernel, dim3(unsigned(ceil_div(p.codebook.size, kTile)), groups), dim3(kTile), 0, stream, p, space);
  launch(nearest_row_halves_kernel, dim3(unsigned(ceil_div(p.x.rows(), kHalfBlock)), groups), dim3(kHalfBlock), 0, stream, p, space);
  if (space.steps == 5)
    screen<5>(p, space, stream);
  else if (space.steps == 9)
    screen<9>(p, space, stream);
  else
    screen<kHalfMaxSteps>(p, space, stream);
  launch(nearest_refine_kernel, dim3(unsigned(ceil_div(p.x.rows(), kRefineRows)), groups), dim3(kRefineThreads), 0, stream, p, e0, space);
}

}  // namespace vq
