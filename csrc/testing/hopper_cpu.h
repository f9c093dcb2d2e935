// The wrappers of cuda/hopper_gpu.h on a CPU, in the same order; see executor.h.
#pragma once

#include <array>

#include "cuda/common.cuh"

namespace vq {

// ---- barriers in shared memory ------------------------------------------------------------------------------------------------

namespace exec {
struct CountingBarrier {  // lives in the kernel's 8 bytes
  uint8_t expected, missing, phase, unused;
  int32_t bytes;
};
static_assert(sizeof(CountingBarrier) == 8, "as large as on a GPU");

inline CountingBarrier& barrier_at(u64* at) { return *reinterpret_cast<CountingBarrier*>(at); }
inline void advance(CountingBarrier& b) {
  if (b.missing || b.bytes) return;
  b.phase ^= 1, b.missing = b.expected;
  ++machine().progress;
}

struct BulkCopy {
  void* to;
  const void* from;
  u32 bytes;
  u64* barrier;
};
inline std::vector<BulkCopy> bulk_copies;
}  // namespace exec

inline void barrier_init(u64* at, int arrivals) {
  exec::bulk_copies.clear();  // of an earlier kernel that failed to wait
  exec::barrier_at(at) = {uint8_t(arrivals), uint8_t(arrivals), 0, 0, 0};
}
inline void barrier_init_done() {}
inline void barrier_arrive(u64* at) {
  exec::CountingBarrier& b = exec::barrier_at(at);
  if (!b.missing) exec::fail("more arrivals at an mbarrier than it was made for");
  --b.missing;
  exec::advance(b);
}
inline void barrier_expect(u64* at, u32 bytes) {
  exec::barrier_at(at).bytes += int32_t(bytes);
  barrier_arrive(at);
}
// Bulk copies land only when somebody waits for a barrier, as late as a GPU may be.
inline void barrier_wait(u64* at, u32 parity) {
  exec::machine().self->waits = "mbarrier";
  while (exec::barrier_at(at).phase == parity) {
    std::vector<exec::BulkCopy> landing;
    landing.swap(exec::bulk_copies);
    for (const exec::BulkCopy& c : landing) {
      std::memcpy(c.to, c.from, c.bytes);
      exec::CountingBarrier& b = exec::barrier_at(c.barrier);
      b.bytes -= int32_t(c.bytes);
      exec::advance(b);
    }
    if (exec::barrier_at(at).phase == parity) exec::yield();
  }
}
inline void bulk_copy(void* to, const void* from, u32 bytes, u64* barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) & 15) exec::fail("cp.async.bulk that is not a multiple of 16");
  exec::bulk_copies.push_back({to, from, bytes, barrier});
}

// ---- warpgroup matrix product: executed when it is waited for; until then the accumulators hold NaN -----------------------------

inline u64 matrix_at(const void* at) {
  const auto offset = u64(static_cast<const unsigned char*>(at) - exec::dynamic_shared());
  if (offset & 15) exec::fail("a wgmma matrix that is not aligned to 16 bytes");
  return offset >> 4 | u64(2048 >> 4) << 16 | u64(128 >> 4) << 32;
}
inline void wgmma_fence() {}
inline void wgmma_commit() { exec::machine().self->wgmmas.emplace_back(nullptr); }  // closes a group
template <int kPending>
void wgmma_wait(float (&)[64]) {
  auto& issued = exec::machine().self->wgmmas;
  int groups = int(std::count_if(issued.begin(), issued.end(), [](auto& f) { return !f; }));
  size_t done = 0;
  for (; groups > kPending; ++done) {
    if (issued[done])
      issued[done]();
    else
      --groups;
  }
  issued.erase(issued.begin(), issued.begin() + long(done));
  exec::exchange_warp(0xFFFFFFFFu, "wgmma_wait", "", 0);  // .sync.aligned: no lane goes on before the whole warp's part is done
}

namespace exec {
inline const float* f16_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (u32 i = 0; i < 65536; ++i) values[i] = f16_to_f32(uint16_t(i));
    return values;
  }();
  return table.data();
}
struct Quad {
  u32 a[4];
};
}  // namespace exec

template <bool kAdd>
void wgmma_64x128x16(float (&d)[64], const u32 (&a)[4], u64 b) {
  const exec::Quad mine = {{a[0], a[1], a[2], a[3]}};
  auto slots = exec::exchange_warp(0xFFFFFFFFu, "wgmma_64x128x16", &mine, sizeof mine);
  const int first = exec::lane() / 4 * 4;
  std::array<std::array<float, 16>, 2> left;  // this thread's rows r and r + 8, 16 components
  const float* table = exec::f16_table();
  for (int k = 0; k < 16; ++k) {
    const exec::Quad from = exec::from_lane<exec::Quad>(slots, first + k % 8 / 2);
    for (int half = 0; half < 2; ++half) left[half][k] = table[from.a[half + k / 8 * 2] >> 16 * (k % 2) & 0xFFFF];
  }
  float* out = d;
  if (!kAdd) std::fill(out, out + 64, NAN);
  const int column = exec::lane() % 4 * 2;
  const unsigned char* shared = exec::dynamic_shared();
  exec::machine().self->wgmmas.emplace_back([=] {
    if (!kAdd) std::fill(out, out + 64, 0.0f);
    const unsigned char* start = shared + ((b & 0x3FFF) << 4);
    const u64 leading = (b >> 16 & 0x3FFF) << 4, stride = (b >> 32 & 0x3FFF) << 4;
    for (int j = 0; j < 16; ++j)
      for (int e = 0; e < 2; ++e) {
        const unsigned char* at = start + j * stride + (column + e) * 16;
        float sum[2] = {};
        for (int k = 0; k < 16; ++k) {
          uint16_t bits;
          std::memcpy(&bits, at + k / 8 * leading + k % 8 * 2, 2);
          for (int half = 0; half < 2; ++half) sum[half] += left[half][k] * table[bits];
        }
        for (int half = 0; half < 2; ++half) out[j * 4 + half * 2 + e] += sum[half];
      }
  });
}

template <int kRegisters>
void registers_down() {}
template <int kRegisters>
void registers_up() {}

inline int with_id(float value, u32 mask, u32 id) { return int((bits_of(value) & mask) | id); }
inline int min3(int a, int b, int c) { return std::min(a, std::min(b, c)); }

}  // namespace vq
