// Builds the pruned road: principal directions, k-d order of the codes, boxes. docs/SEARCH.md derives the allowances.
#include <math.h>

#include <algorithm>
#include <numeric>

#include "codes.h"

namespace vqfast {
namespace {

constexpr double kUnitRoundoff = 0x1p-24;
constexpr int64_t kBasisSample = 512;  // codes that the principal directions are estimated from: a quarter of them, this at most
constexpr int64_t kBasisSampleLeast = 128;
constexpr int kExtra = 4;              // directions iterated beyond those kept
constexpr int kIterations = 3;
constexpr double kWorthIt = 0.55;      // share of the variance that the directions must hold

// Rows made orthonormal in double, in place; a row that vanishes becomes zero.
void orthonormalise(std::vector<double>& rows, int count, int64_t dim) {
  for (int i = 0; i < count; ++i) {
    double* row = rows.data() + i * dim;
    for (int pass = 0; pass < 2; ++pass) {
      for (int j = 0; j < i; ++j) {
        const double* other = rows.data() + j * dim;
        double dot = 0;
        for (int64_t d = 0; d < dim; ++d) dot += row[d] * other[d];
        for (int64_t d = 0; d < dim; ++d) row[d] -= dot * other[d];
      }
    }
    double norm = 0;
    for (int64_t d = 0; d < dim; ++d) norm += row[d] * row[d];
    norm = sqrt(norm);
    for (int64_t d = 0; d < dim; ++d) row[d] = norm > 1e-30 ? row[d] / norm : 0.0;
  }
}

// |P P' - I| in the Frobenius norm over the rows that are not zero.
double orthonormality_defect(const std::vector<float>& rows, int count, int64_t dim) {
  double total = 0;
  for (int i = 0; i < count; ++i) {
    for (int j = i; j < count; ++j) {
      double dot = 0;
      for (int64_t d = 0; d < dim; ++d) dot += (double)rows[i * dim + d] * rows[j * dim + d];
      if (i == j && dot == 0) continue;
      const double off = dot - (i == j ? 1.0 : 0.0);
      total += (i == j ? 1 : 2) * off * off;
    }
  }
  return sqrt(total);
}

// Splits [begin, end) panels of codes until one is left; writes nodes and permutes `order`.
class Splitter {
 public:
  Splitter(const PanelQuery* at, std::vector<int32_t>& order, int width)
      : at_(at), order_(order), width_(width), scratch_(new Key[order.size()]) {}

  // Nodes are laid out so that a subtree of p panels takes exactly 2p - 1 of them: the halves can be built side by side.
  void run(PanelTree& tree, int32_t node, int64_t begin, int64_t end, const Parallel& parallel, int depth) {
    if (end - begin == 1) {
      tree.nodes[node] = {{node, node}, INFINITY, 0, (int32_t)begin};
      return;
    }
    const int64_t middle = begin + (end - begin) / 2;
    const int64_t first = begin * kPanel, last = std::min<int64_t>(end * kPanel, order_.size()), cut = middle * kPanel;
    const int coordinate = widest(first, last);
    for (int64_t i = first; i < last; ++i) scratch_[i] = {at_[order_[i]].coordinate[coordinate], order_[i]};
    std::nth_element(scratch_.get() + first, scratch_.get() + cut, scratch_.get() + last,
                     [](const Key& a, const Key& b) { return a.value < b.value; });
    for (int64_t i = first; i < last; ++i) order_[i] = scratch_[i].code;
    const int32_t left = node + 1, right = node + (int32_t)(2 * (middle - begin));
    tree.nodes[node] = {{left, right}, scratch_[cut].value, coordinate, 0};
    const auto half = [&](int64_t side) {
      if (side == 0) run(tree, left, begin, middle, parallel, depth + 1);
      else run(tree, right, middle, end, parallel, depth + 1);
    };
    if (depth == 0) parallel(2, 1, [&](int64_t b, int64_t e) { for (int64_t side = b; side < e; ++side) half(side); });
    else half(0), half(1);
  }

 private:
  struct Key {
    float value;
    int32_t code;
  };

  int widest(int64_t first, int64_t last) const {
    const int64_t n = last - first, step = std::max<int64_t>(1, n / 256);
    double best = -1;
    int chosen = 0;
    float sum[kMaxBasis + 1] = {}, square[kMaxBasis + 1] = {};
    int64_t count = 0;
    const float* origin = at_[order_[first]].coordinate;
    for (int64_t i = first; i < last; i += step, ++count) {
      const float* c = at_[order_[i]].coordinate;
      for (int j = 0; j < width_; ++j) {
        const float v = c[j] - origin[j];
        sum[j] += v;
        square[j] += v * v;
      }
    }
    for (int j = 0; j < width_; ++j) {
      const double variance = square[j] - (double)sum[j] * sum[j] / count;
      if (variance > best) {
        best = variance;
        chosen = j;
      }
    }
    return chosen;
  }

  const PanelQuery* at_;
  std::vector<int32_t>& order_;
  int width_;
  std::unique_ptr<Key[]> scratch_;
};

}  // namespace

PanelBuild::PanelBuild(const Codes& codes, const Hints& hints, const Parallel& parallel) {
  if (codes.work().dim > kMaxPanelDim) return;
  find_basis(codes, hints);
  if (captured < kWorthIt) return;
  worth_it = true;
  project_codes(codes, parallel);
  find_order(hints, codes, parallel);
  fill_panels(codes, parallel);
}

// Principal directions of a sample by subspace iteration, or the caller's. Any orthonormal rows are valid: they decide the cost only.
void PanelBuild::find_basis(const Codes& codes, const Hints& hints) {
  const int64_t dim = codes.work().dim, k = (int64_t)codes.searched().size();
  const float* centre = codes.centre().data();
  const int64_t n = std::min(k, std::max(kBasisSampleLeast, std::min(kBasisSample, k / 4)));
  std::vector<const float*> sample;
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = codes.work().row(codes.searched()[i * k / n]);
    const double square = kernels().centred_norm(row, centre, dim);
    if (!(square < kFarSquare)) continue;
    total += square;
    sample.push_back(row);
  }
  const int directions = dim <= 4 ? 4 : 8;
  const int iterated = (int)std::min<int64_t>(directions + kExtra, dim);
  std::vector<double> rows((size_t)std::max(iterated, directions) * dim, 0.0);
  const bool given = hints.basis && hints.directions >= directions;
  if (given) {
    for (int64_t i = 0; i < directions * dim; ++i) rows[i] = std::isfinite(hints.basis[i]) ? hints.basis[i] : 0.0;
    orthonormalise(rows, directions, dim);
  } else {
    uint64_t state = 88172645463325252ull;
    for (int64_t i = 0; i < iterated * dim; ++i) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      rows[i] = (double)(int64_t)state;
    }
    orthonormalise(rows, iterated, dim);
    std::vector<float> current(iterated * dim), next(iterated * dim);
    for (int step = 0; step < kIterations; ++step) {
      for (size_t i = 0; i < current.size(); ++i) current[i] = (float)rows[i];
      std::fill(next.begin(), next.end(), 0.0f);
      for (const float* row : sample)
        kernels().apply_covariance(row, centre, current.data(), iterated, dim, next.data());
      // Largest images first, so that the leading rows are the principal ones.
      std::vector<double> length(iterated, 0.0);
      for (int j = 0; j < iterated; ++j)
        for (int64_t d = 0; d < dim; ++d) length[j] += (double)next[j * dim + d] * next[j * dim + d];
      std::vector<int> rank(iterated);
      std::iota(rank.begin(), rank.end(), 0);
      std::stable_sort(rank.begin(), rank.end(), [&](int a, int b) { return length[a] > length[b]; });
      for (int j = 0; j < iterated; ++j)
        for (int64_t d = 0; d < dim; ++d) rows[j * dim + d] = next[rank[j] * dim + d];
      orthonormalise(rows, iterated, dim);
    }
  }
  basis.resize(directions * dim);
  for (int64_t i = 0; i < directions * dim; ++i) basis[i] = std::isfinite(rows[i]) ? (float)rows[i] : 0.0f;
  const int64_t step = (2 * directions + kernels().lanes - 1) / kernels().lanes * kernels().lanes;
  directions_.assign((dim + 1) / 2 * step, 0.0f);
  for (int j = 0; j < directions; ++j)
    for (int64_t d = 0; d < dim; ++d) directions_[d / 2 * step + 2 * j + d % 2] = basis[j * dim + d];
  plan.width = directions + 1;
  plan.dim = dim;
  centre_ = centre;
  double kept = 0;
  for (const float* row : sample) {
    PanelQuery query;
    project(&row, 1, &query);
    for (int j = 0; j < directions; ++j) kept += (double)query.coordinate[j] * query.coordinate[j];
  }
  captured = total > 0 ? kept / total : 0;

  const double ops = kernels().ops_per_term, defect = orthonormality_defect(basis, directions, dim);
  const double per_sum = ops * (dim / 2 + 8) * kUnitRoundoff;              // at least two sums side by side
  const double projection = sqrt((double)directions) * (per_sum + 2 * kUnitRoundoff) * 1.1;
  rest_rel = (float)(2 * projection + projection * projection + 4 * defect + 2 * per_sum + 4 * directions * kUnitRoundoff);
  plan.codes = codes.work().data;
  plan.ld = codes.work().ld;
  plan.screen_rel = (float)(2 * projection + projection * projection + 3 * defect + 2 * per_sum +
                            4 * ops * (directions + 6) * kUnitRoundoff);
  plan.full_rel = (float)(2 * per_sum + 8 * kUnitRoundoff);
  // Unit vectors carry their own rounding, and the contract's double rounding of the similarity shows as a distance too.
  plan.radius = codes.unit_vectors() ? (float)(8 * kUnitRoundoff + sqrt((dim + 8) * 0x1p-50)) : 0.0f;
  plan.tiny = 1e-30f;
}

// The three widest coordinates of a panel's box, and where and how fast they are cut into cells.
void PanelBuild::find_grid(int64_t panel, const float* low, const float* high) {
  Grid& grid = grids_[panel];
  float extent[3] = {-1, -1, -1};
  for (int j = 0; j < plan.width; ++j) {
    const float e = high[j] - low[j];
    for (int i = 0; i < 3; ++i) {
      if (!(e > extent[i])) continue;
      for (int k = 2; k > i; --k) extent[k] = extent[k - 1], grid.coordinate[k] = grid.coordinate[k - 1];
      extent[i] = e, grid.coordinate[i] = (int8_t)j;
      break;
    }
  }
  for (int i = 0; i < 3; ++i) {
    grid.low[i] = low[grid.coordinate[i]];
    grid.per_unit[i] = extent[i] > 0 ? 1.0f / extent[i] : 0.0f;
  }
}

int32_t PanelBuild::place_in_panel(int32_t panel, const PanelQuery& row, int bits) const {
  const Grid& grid = grids_[panel];
  int32_t place = 0;
  const int cells = 1 << bits;
  for (int i = 0; i < 3; ++i) {
    const float at = (row.coordinate[grid.coordinate[i]] - grid.low[i]) * grid.per_unit[i] * cells;
    int step = at > 0 ? at < (float)(cells - 1) ? (int)at : cells - 1 : 0;
    if (place & 1) step = cells - 1 - step;  // there and back, so that neighbours in the order are neighbours in the box
    place = (place << bits) | step;
  }
  return place;
}

void PanelBuild::project(const float* const* rows, int n, PanelQuery* out) const {
  PanelQuery* to[kRowsTogether];
  for (int r = 0; r < n; ++r) to[r] = out + r;
  kernels().project(rows, n, centre_, directions_.data(), plan.width - 1, plan.dim, rest_rel, to);
}

void PanelBuild::project_codes(const Codes& codes, const Parallel& parallel) {
  const std::vector<int32_t>& searched = codes.searched();
  coordinates_.reset(new PanelQuery[searched.size()]);
  parallel((int64_t)searched.size(), 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kRowsTogether) {
      const int n = (int)std::min<int64_t>(kRowsTogether, end - i);
      const float* rows[kRowsTogether];
      for (int r = 0; r < n; ++r) rows[r] = codes.work().row(searched[i + r]);
      project(rows, n, &coordinates_[i]);
    }
  });
  // order: positions in `searched` of the codes within reach; turned into codes once the panels are filled.
  order.clear();
  for (size_t i = 0; i < searched.size(); ++i)
    if (coordinates_[i].norm < (float)kFarSquare) order.push_back((int32_t)i);
}

void PanelBuild::find_order(const Hints&, const Codes&, const Parallel& parallel) {
  const int64_t panels = ((int64_t)order.size() + kPanel - 1) / kPanel;
  tree.nodes.resize(std::max<int64_t>(1, 2 * panels - 1));
  if (panels == 0) {
    tree.nodes[0] = {{0, 0}, INFINITY, 0, 0};
    return;
  }
  Splitter(coordinates_.get(), order, plan.width).run(tree, 0, 0, panels, parallel, 0);
  while ((int64_t)1 << tree.depth < panels) ++tree.depth;  // halves differ by one panel at most
}

void PanelBuild::fill_panels(const Codes& codes, const Parallel& parallel) {
  const int64_t panels = ((int64_t)order.size() + kPanel - 1) / kPanel, width = plan.width;
  const int64_t groups = (panels + kPanelGroup - 1) / kPanelGroup, blocks = (groups + kPanelGroup - 1) / kPanelGroup;
  const int64_t box = width * kPanelGroup;
  storage_.reset(new float[panels * kPanel * (width + 1) + (groups + blocks) * (2 * box + kPanelGroup)]);
  float* values = storage_.get();
  float* start = values + panels * kPanel * width;
  float* low = start + panels * kPanel;
  float* high = low + groups * box;
  float* allowance = high + groups * box;
  float* group_low = allowance + groups * kPanelGroup;
  float* group_high = group_low + blocks * box;
  float* group_allowance = group_high + blocks * box;
  id_.assign(panels * kPanel, 0);
  grids_.resize(panels);
  const float of_box = 2 * rest_rel + 4 * plan.screen_rel;
  parallel(groups, 4, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      for (int i = 0; i < kPanelGroup; ++i) {
        float lo[kMaxBasis + 1], hi[kMaxBasis + 1], largest = 0;
        std::fill(lo, lo + width, INFINITY);
        std::fill(hi, hi + width, -INFINITY);
        const int64_t p = g * kPanelGroup + i;
        for (int lane = 0; lane < kPanel && p < panels; ++lane) {
          const int64_t at = p * kPanel + lane;
          float* to = values + p * kPanel * width + lane;
          if (at >= (int64_t)order.size()) {
            for (int64_t j = 0; j < width; ++j) to[j * kPanel] = 0.0f;
            start[at] = INFINITY;
            continue;
          }
          const PanelQuery& c = coordinates_[order[at]];
          id_[at] = codes.searched()[order[at]];
          start[at] = nextafterf(0.5f * c.norm * (1.0f - 2.5f * plan.screen_rel), -INFINITY);
          largest = std::max(largest, c.norm);
          for (int64_t j = 0; j < width; ++j) {
            to[j * kPanel] = c.coordinate[j];
            lo[j] = std::min(lo[j], c.coordinate[j]);
            hi[j] = std::max(hi[j], c.coordinate[j]);
          }
        }
        for (int64_t j = 0; j < width; ++j) {
          low[g * box + j * kPanelGroup + i] = lo[j];
          high[g * box + j * kPanelGroup + i] = hi[j];
        }
        if (p < panels) find_grid(p, lo, hi);
        allowance[g * kPanelGroup + i] = of_box * largest;
      }
    }
  });
  for (int64_t g = 0; g < blocks * kPanelGroup; ++g) {
    const int64_t to = g / kPanelGroup * box + g % kPanelGroup;
    float largest = 0;
    for (int64_t j = 0; j < width; ++j) {
      const float* lo = low + g * box + j * kPanelGroup;
      const float* hi = high + g * box + j * kPanelGroup;
      group_low[to + j * kPanelGroup] = g < groups ? *std::min_element(lo, lo + kPanelGroup) : INFINITY;
      group_high[to + j * kPanelGroup] = g < groups ? *std::max_element(hi, hi + kPanelGroup) : -INFINITY;
    }
    if (g < groups) largest = *std::max_element(allowance + g * kPanelGroup, allowance + (g + 1) * kPanelGroup);
    group_allowance[g] = largest;
  }
  plan.panels = values;
  plan.start = start;
  plan.id = id_.data();
  plan.low = low;
  plan.high = high;
  plan.allowance = allowance;
  plan.group_low = group_low;
  plan.group_high = group_high;
  plan.group_allowance = group_allowance;
  plan.panels_count = panels;
  plan.groups_count = groups;
  for (int32_t& at : order) at = codes.searched()[at];
}

}  // namespace vqfast
