// The search kernels of the avx512 level.
#include <immintrin.h>
#include <stdint.h>

#include "search.h"

namespace vqfast {
namespace {
#include "lanes_avx512.h"
#include "search_impl.h"
}  // namespace

const Kernels* kernels_avx512() { return &kTable; }

}  // namespace vqfast
