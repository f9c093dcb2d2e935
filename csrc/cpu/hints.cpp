#include "hints.h"

#include <algorithm>
#include <numeric>

#include "codes.h"

namespace vqfast {

int64_t hint_directions(int64_t dim) { return std::min<int64_t>(dim, PanelBuild::directions_of(dim)); }

void find_hints(const View& codebook, Metric metric, int64_t* order, float* basis, const Parallel& parallel) {
  FloatMode mode;
  const int64_t k = codebook.size[2], dim = codebook.size[3], directions = hint_directions(dim);
  for (int64_t g = 0; g < codebook.size[1]; ++g, order += k, basis += directions * dim) {
    std::iota(order, order + k, 0);
    std::fill(basis, basis + directions * dim, 0.0f);
    const Rows given = rows_of_group(codebook, g, parallel);
    const Codes codes({given.data, given.ld, given.dim, nullptr, metric}, k, parallel);
    if (codes.searched().empty()) continue;
    const PanelBuild panels(codes, Hints{}, parallel);
    if (!panels.basis()) continue;
    for (int64_t j = 0; j < directions; ++j) std::copy_n(panels.basis() + j * panels.plan.dim, dim, basis + j * dim);
    std::vector<char> in_panels(k, 0);
    for (int32_t code : panels.order) in_panels[code] = 1;
    int64_t* rest = std::copy(panels.order.begin(), panels.order.end(), order);
    for (int64_t c = 0; c < k; ++c)
      if (!in_panels[c]) *rest++ = c;
  }
}

}  // namespace vqfast
