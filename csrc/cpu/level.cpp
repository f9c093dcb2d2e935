// The SIMD level: chosen once from what the processor has, or forced.
#include <atomic>

#include "search.h"

namespace vqfast {
namespace {
std::atomic<int> g_level{-1};
}

int level_supported() {
#if defined(__x86_64__) && !defined(VQFAST_NO_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return __builtin_cpu_supports("avx512vnni") ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

int level() {
  const int chosen = g_level.load(std::memory_order_relaxed);
  return chosen < 0 ? level_supported() : chosen;
}

void set_level(int level) { g_level.store(level); }

const Kernels& kernels() {
#if defined(__x86_64__) && !defined(VQFAST_NO_X86)
  switch (level()) {
    case 3: return *kernels_avx512vnni();
    case 2: return *kernels_avx512();
    case 1: return *kernels_avx2();
  }
#endif
  return *kernels_scalar();
}

}  // namespace vqfast
