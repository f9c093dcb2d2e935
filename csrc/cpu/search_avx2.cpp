// The search kernels of the avx2 level.
#include <immintrin.h>
#include <stdint.h>

#include "search.h"

namespace vqfast {
namespace {
#include "lanes_avx2.h"
#include "search_impl.h"
}  // namespace

const Kernels* kernels_avx2() { return &kTable; }

}  // namespace vqfast
