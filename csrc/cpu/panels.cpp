// Builds the pruned road: principal directions, k-d order of the codes, boxes. docs/SEARCH.md derives the allowances.
#include <math.h>
#include <string.h>

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
  find_grid_scale(codes);
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
  plan.directions = directions;
  plan.dim = dim;
  centre_ = centre;
  double kept = 0;
  for (const float* row : sample) {
    PanelQuery query;
    project(row, 0, 1, &query);
    for (int j = 0; j < directions; ++j) kept += (double)query.coordinate[j] * query.coordinate[j];
  }
  captured = total > 0 ? kept / total : 0;

  const double ops = kernels().ops_per_term, defect = orthonormality_defect(basis, directions, dim);
  const double per_sum = ops * (dim / 2 + 8) * kUnitRoundoff;              // at least two sums side by side
  const double projection = sqrt((double)directions) * (per_sum + 2 * kUnitRoundoff) * 1.1;
  rest_rel = (float)(2 * projection + projection * projection + 4 * defect + 2 * per_sum + 4 * directions * kUnitRoundoff);
  plan.codes = codes.work().data;
  plan.ld = codes.work().ld;
  plan.row_rel = (float)(2 * projection + projection * projection + 3 * defect + 2 * per_sum +
                         4 * ops * (directions + 6) * kUnitRoundoff);
  plan.code_rel = (float)(plan.row_rel + rest_rel + 1e-6);
  plan.full_rel = (float)(2 * per_sum + 8 * kUnitRoundoff);
  // Unit vectors carry their own rounding, and the contract's double rounding of the similarity shows as a distance too.
  plan.radius = codes.unit_vectors() ? (float)(8 * kUnitRoundoff + sqrt((dim + 8) * 0x1p-50)) : 0.0f;
  plan.tiny = 1e-30f;
}

// The three widest coordinates of a panel's box, and where and how fast they are cut into cells.
void PanelBuild::find_grid(int64_t panel, const float* low, const float* high) {
  Grid& grid = grids_[panel];
  float extent[3] = {-1, -1, -1};
  for (int j = 0; j <= plan.directions; ++j) {
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
  const int32_t last = (1 << bits) - 1;
  int32_t place = 0;
  for (int i = 0; i < 3; ++i) {
    const float at = (row.coordinate[grid.coordinate[i]] - grid.low[i]) * grid.per_unit[i] * (float)(last + 1);
    const int32_t step = (int32_t)std::max(0.0f, std::min((float)last, at));
    // There and back, so that neighbours in the order are neighbours in the box.
    place = (place << bits) | (step ^ (-(place & 1) & last));
  }
  return place;
}

void PanelBuild::project(const float* rows, int64_t ld, int64_t n, PanelQuery* out) const {
  kernels().project(rows, ld, n, centre_, basis.data(), plan.directions, plan.dim, rest_rel, out);
}

void PanelBuild::project_codes(const Codes& codes, const Parallel& parallel) {
  const std::vector<int32_t>& searched = codes.searched();
  coordinates_.reset(new PanelQuery[searched.size()]);
  parallel((int64_t)searched.size(), 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) project(codes.work().row(searched[i]), 0, 1, &coordinates_[i]);
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
  Splitter(coordinates_.get(), order, plan.directions + 1).run(tree, 0, 0, panels, parallel, 0);
  while ((int64_t)1 << tree.depth < panels) ++tree.depth;  // halves differ by one panel at most
}

// The grid spans the codes, but for a few that lie far out: they are clamped to it, which brings points closer, never apart.
void PanelBuild::find_grid_scale(const Codes& codes) {
  float widest = 0;
  for (const int32_t at : order)
    for (int j = 0; j <= plan.directions; ++j) widest = std::max(widest, fabsf(coordinates_[at].coordinate[j]));
  const float ordinary = (float)(8 * sqrt(codes.typical_square()));
  const float span = ordinary > 0 ? std::min(widest, ordinary) : widest;
  plan.per_unit = span > 1e-15f ? kGrid / span : kGrid / 1e-15f;
  plan.rounding = 2 * 0.503f * sqrtf((float)(plan.directions + 1));
}

namespace {

// The least and the greatest of some points, pair by pair.
struct Box {
  int16_t low[2 * kMaxPairs], high[2 * kMaxPairs];
  Box() {
    std::fill_n(low, 2 * kMaxPairs, (int16_t)kGrid);
    std::fill_n(high, 2 * kMaxPairs, (int16_t)-kGrid);
  }
  void add(const int16_t* least, const int16_t* greatest) {
    for (int j = 0; j < 2 * kMaxPairs; ++j) {
      low[j] = std::min(low[j], least[j]);
      high[j] = std::max(high[j], greatest[j]);
    }
  }
  // As the i-th of 16 boxes [pairs, 16].
  void store(int pairs, int i, int32_t* to_low, int32_t* to_high) const {
    for (int j = 0; j < pairs; ++j) {
      memcpy(to_low + j * kPanelGroup + i, low + 2 * j, 4);
      memcpy(to_high + j * kPanelGroup + i, high + 2 * j, 4);
    }
  }
};

}  // namespace

void PanelBuild::fill_panels(const Codes& codes, const Parallel& parallel) {
  const int64_t panels = ((int64_t)order.size() + kPanel - 1) / kPanel, pairs = plan.directions / 2 + 1;
  const int64_t groups = (panels + kPanelGroup - 1) / kPanelGroup, blocks = (groups + kPanelGroup - 1) / kPanelGroup;
  const int64_t box = pairs * kPanelGroup;
  storage_ = aligned_ints(panels * kPanel * (pairs + 1) + (groups + blocks) * 2 * box);
  int32_t* values = storage_.get();
  int32_t* start = values + panels * kPanel * pairs;
  int32_t* low = start + panels * kPanel;
  int32_t* high = low + groups * box;
  int32_t* group_low = high + groups * box;
  int32_t* group_high = group_low + blocks * box;
  id_.assign(panels * kPanel, 0);
  grids_.resize(panels);
  parallel((int64_t)codes.searched().size(), 2048, [&](int64_t begin, int64_t end) {
    kernels().round_to_grid(plan.per_unit, plan.directions, &coordinates_[begin], end - begin);
  });
  std::vector<Box> group_box(blocks * kPanelGroup);
  parallel(groups, 4, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      for (int i = 0; i < kPanelGroup; ++i) {
        float lo[kMaxBasis + 1], hi[kMaxBasis + 1];
        std::fill_n(lo, kMaxBasis + 1, INFINITY);
        std::fill_n(hi, kMaxBasis + 1, -INFINITY);
        Box all;
        const int64_t p = g * kPanelGroup + i;
        for (int lane = 0; lane < kPanel && p < panels; ++lane) {
          const int64_t at = p * kPanel + lane;
          int32_t* to = values + p * kPanel * pairs + lane;
          if (at >= (int64_t)order.size()) {
            for (int64_t j = 0; j < pairs; ++j) to[j * kPanel] = 0;
            start[at] = INT32_MAX;
            continue;
          }
          const PanelQuery& c = coordinates_[order[at]];
          id_[at] = codes.searched()[order[at]];
          int16_t point[2 * kMaxPairs], negated[2 * kMaxPairs];
          memcpy(point, c.grid, sizeof(point));
          int32_t square = 0;
          for (int j = 0; j < 2 * pairs; ++j) {
            square += (int32_t)point[j] * point[j];
            negated[j] = (int16_t)-point[j];
          }
          start[at] = square >> 1;
          for (int64_t j = 0; j < pairs; ++j) memcpy(to + j * kPanel, negated + 2 * j, 4);
          all.add(point, point);
          for (int j = 0; j <= plan.directions; ++j) {
            lo[j] = std::min(lo[j], c.coordinate[j]);
            hi[j] = std::max(hi[j], c.coordinate[j]);
          }
        }
        all.store((int)pairs, i, low + g * box, high + g * box);
        group_box[g].add(all.low, all.high);
        if (p < panels) find_grid(p, lo, hi);
      }
    }
  });
  for (int64_t g = 0; g < blocks * kPanelGroup; ++g)
    group_box[g].store((int)pairs, (int)(g % kPanelGroup), group_low + g / kPanelGroup * box, group_high + g / kPanelGroup * box);
  plan.panels = values;
  plan.start = start;
  plan.id = id_.data();
  plan.low = low;
  plan.high = high;
  plan.group_low = group_low;
  plan.group_high = group_high;
  plan.panels_count = panels;
  plan.groups_count = groups;
  for (int32_t& at : order) at = codes.searched()[at];
}

}  // namespace vqfast
