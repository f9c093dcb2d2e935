// The wrappers of cuda/common.cuh on a CPU, in the order of cuda/device_gpu.h; see executor.h.
#pragma once

#include "testing/executor.h"

namespace vq {

// ---- launch -----------------------------------------------------------------------------------------------------------------

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A... args) {
  exec::launch(grid, block, shared_bytes, [&] { kernel(args...); });
}

template <class... P>
size_t static_shared_bytes(void (*)(P...)) { return 1; }

inline const char* launch_error() { return nullptr; }

// VQFAST_EXECUTOR_SMS: how many multiprocessors the launchers believe in, so that tests reach every split.
inline int multiprocessors() {
  const char* count = std::getenv("VQFAST_EXECUTOR_SMS");
  return count ? std::max(1, std::atoi(count)) : 4;
}

// VQFAST_EXECUTOR_HOPPER=1: the launchers take the device for one that has wgmma.
inline bool hopper() {
  const char* wanted = std::getenv("VQFAST_EXECUTOR_HOPPER");
  return wanted && std::strcmp(wanted, "1") == 0;
}

#define VQ_SHARED(Type, name)         \
  static const char name##_key = 0; \
  Type& name = ::vq::exec::block_shared<Type>(&name##_key)
#define VQ_DYNAMIC_SHARED(name) unsigned char* name = ::vq::exec::dynamic_shared()

// ---- synchronisation and warp collectives -----------------------------------------------------------------------------------

__forceinline__ void sync_threads(int line = __builtin_LINE()) {
  const dim3& b = exec::machine().block;
  exec::barrier(0, int(b.x * b.y * b.z), line);
}
__forceinline__ void sync_warp(uint32_t mask = 0xFFFFFFFFu) { exec::exchange_warp(mask, "sync_warp", "", 0); }

namespace exec {
inline int lane() { return machine().self->linear % kWarp; }
template <class T>
T from_checked_lane(uint32_t mask, const char* what, T value, int source) {
  static_assert(sizeof(T) <= 8, "the GPU shuffles 4 or 8 bytes");
  auto slots = exchange_warp(mask, what, &value, sizeof value);
  if (source < 0 || source >= kWarp) return value;
  if (!(mask >> source & 1)) fail(name_of(*machine().self) + " reads a lane outside the mask in " + what);
  return from_lane<T>(slots, source);
}
}  // namespace exec

template <class T>
T shfl(uint32_t mask, T value, int lane) { return exec::from_checked_lane(mask, "shfl", value, lane); }
template <class T>
T shfl_xor(uint32_t mask, T value, int step) { return exec::from_checked_lane(mask, "shfl_xor", value, exec::lane() ^ step); }
template <class T>
T shfl_up(uint32_t mask, T value, int step) { return exec::from_checked_lane(mask, "shfl_up", value, exec::lane() - step); }

inline uint32_t ballot(uint32_t mask, bool flag) {
  auto slots = exec::exchange_warp(mask, "ballot", &flag, sizeof flag);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) bits |= uint32_t(exec::from_lane<bool>(slots, i)) << i;
  return bits;
}
inline uint32_t match_any(uint32_t mask, uint32_t value) {
  auto slots = exec::exchange_warp(mask, "match_any", &value, sizeof value);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) bits |= uint32_t(exec::from_lane<uint32_t>(slots, i) == value) << i;
  return bits;
}
inline int popcount(uint32_t bits) { return __builtin_popcount(bits); }

template <class T>
T atomic_add(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
inline int atomic_min(int* at, int value) {
  const int before = *at;
  *at = std::min(before, value);
  return before;
}
inline int atomic_max(int* at, int value) {
  const int before = *at;
  *at = std::max(before, value);
  return before;
}

// ---- asynchronous copies: they land when they are waited for, as late as a GPU may be ---------------------------------------

inline void copy_async16(void* to, const void* from, int valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15) exec::fail("cp.async with an address that is not a multiple of 16");
  exec::machine().self->copy_groups.back().push_back({to, from, 16, valid});
}
inline void copy_commit() { exec::machine().self->copy_groups.emplace_back(); }
template <int kPending>
void copy_wait() {
  auto& groups = exec::machine().self->copy_groups;  // the open group at the end does not count
  while (groups.size() > size_t(kPending) + 1) {
    for (const exec::Copy& c : groups.front()) {
      std::memset(c.to, 0, c.bytes);
      std::memcpy(c.to, c.from, c.valid);
    }
    groups.erase(groups.begin());
  }
}

// ---- arithmetic: compiled with -ffp-contract=off ----------------------------------------------------------------------------

__forceinline__ float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__forceinline__ float sub(float a, float b) { return a - b; }
__forceinline__ double add(double a, double b) { return a + b; }
__forceinline__ double sub(double a, double b) { return a - b; }
__forceinline__ double mul(double a, double b) { return a * b; }
__forceinline__ double div(double a, double b) { return a / b; }
__forceinline__ double sqrt_rn(double a) { return std::sqrt(a); }
__forceinline__ float round_up(double a) {
  const float f = float(a);
  return double(f) < a ? std::nextafterf(f, INFINITY) : f;
}
__forceinline__ float round_down(double a) {
  const float f = float(a);
  return double(f) > a ? std::nextafterf(f, -INFINITY) : f;
}

__forceinline__ uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
__forceinline__ float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float f16_to_f32(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24));
}
inline float bf16_to_f32(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
inline uint16_t f32_to_f16(float value) {
  const uint16_t sign = uint16_t(bits_of(value) >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (size != size) return sign | 0x7E00;
  if (size == 0) return sign;
  if (size >= 65520.0f) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(size, &exponent);                                // size = m 2^exponent, m in [1/2, 1)
  const int shift = std::max(exponent - 11, -24);             // one unit of the last place is 2^shift
  const auto units = uint32_t(std::nearbyint(std::ldexp(size, -shift)));  // ties to even
  // Adding carries into the exponent is what float formats are made for.
  return uint16_t(sign | (shift == -24 ? units : ((shift + 24) << 10) + units));
}
inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// ---- warp-level matrix products: fragments as the PTX manual lays them out ---------------------------------------------------

namespace exec {
struct MmaIn {
  uint32_t a[4], b[2];
};

// Two components per 32-bit register; row r of A is held by lanes 4 (r % 8) .. +3, column c of B by lanes 4 c .. +3.
template <class Get>
void mma(float (&d)[4], const MmaIn& in, const char* what, Get get) {
  auto slots = exchange_warp(0xFFFFFFFFu, what, &in, sizeof in);
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + 8 * (i / 2), column = lane() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int half = k / 8, quad = k % 8 / 2, part = k % 2;
      const MmaIn left = from_lane<MmaIn>(slots, row % 8 * 4 + quad), right = from_lane<MmaIn>(slots, column * 4 + quad);
      sum += get(left.a[row / 8 + 2 * half], part) * get(right.b[half], part);
    }
    d[i] += sum;
  }
}
}  // namespace exec

inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const exec::MmaIn in = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  exec::mma(d, in, "mma_16x8x16", [](uint32_t word, int part) { return f16_to_f32(uint16_t(word >> 16 * part)); });
}
inline void mma_16x8x16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const exec::MmaIn in = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  exec::mma(d, in, "mma_16x8x16_bf16", [](uint32_t word, int part) { return bf16_to_f32(uint16_t(word >> 16 * part)); });
}

}  // namespace vq
