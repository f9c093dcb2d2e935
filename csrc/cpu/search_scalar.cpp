// The search kernels of the scalar level.
#include <stdint.h>

#include "search.h"

namespace vqfast {
namespace {
#include "lanes_scalar.h"
#include "search_impl.h"
}  // namespace

const Kernels* kernels_scalar() { return &kTable; }

}  // namespace vqfast
