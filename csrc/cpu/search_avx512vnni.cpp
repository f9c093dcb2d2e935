// The search kernels of the avx512vnni level: avx512 with products of int16 pairs added in one instruction.
#include <immintrin.h>
#include <stdint.h>

#include "search.h"

namespace vqfast {
namespace {
#include "lanes_avx512.h"
#include "search_impl.h"
}  // namespace

const Kernels* kernels_avx512vnni() { return &kTable; }

}  // namespace vqfast
