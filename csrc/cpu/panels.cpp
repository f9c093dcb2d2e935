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
constexpr int kExtra = 3;              // directions iterated beyond those kept
constexpr int kIterations = 2;
constexpr int kShares = 2;             // of the sample that threads take; part of the result's definition
constexpr double kMargin = 1.5;        // how much larger than the sample's largest square others may be
constexpr double kWorthIt = 0.55;      // share of the variance that the directions must hold

// Rows made orthonormal in double, in place; a row that vanishes becomes zero.
void orthonormalise(std::vector<double>& rows, int count, int64_t dim) {
  for (int i = 0; i < count; ++i) {
    double* row = rows.data() + i * dim;
    for (int pass = 0; pass < 2; ++pass) {
      for (int j = 0; j < i; ++j) {
        const double* other = rows.data() + j * dim;
        const double dot = product_of(row, other, dim);
        for (int64_t d = 0; d < dim; ++d) row[d] -= dot * other[d];
      }
    }
    const double norm = sqrt(product_of(row, row, dim)), factor = norm > 1e-30 ? 1.0 / norm : 0.0;
    for (int64_t d = 0; d < dim; ++d) row[d] *= factor;
  }
}

// |P P' - I| in the Frobenius norm over the rows that are not zero.
double orthonormality_defect(const float* rows, int count, int64_t dim) {
  double total = 0;
  for (int i = 0; i < count; ++i) {
    for (int j = i; j < count; ++j) {
      const double dot = product_of(rows + i * dim, rows + j * dim, dim);
      if (i == j && dot == 0) continue;
      const double off = dot - (i == j ? 1.0 : 0.0);
      total += (i == j ? 1 : 2) * off * off;
    }
  }
  return sqrt(total);
}

// The least and the greatest of some points, place by place.
struct Box {
  typedef int16_t Places __attribute__((vector_size(32)));
  Places low, high;
  Box() {
    for (int j = 0; j < 16; ++j) low[j] = INT16_MAX, high[j] = INT16_MIN;
  }
  void add(const Places& least, const Places& greatest) {
    low = low < least ? low : least;
    high = high > greatest ? high : greatest;
  }
  // As the i-th of 16 boxes [pairs, 16].
  void store(int pairs, int i, int32_t* to_low, int32_t* to_high) const {
    for (int j = 0; j < pairs; ++j) {
      memcpy(to_low + j * kPanelGroup + i, reinterpret_cast<const int32_t*>(&low) + j, 4);
      memcpy(to_high + j * kPanelGroup + i, reinterpret_cast<const int32_t*>(&high) + j, 4);
    }
  }
};

// Nodes are laid out so that a subtree of p panels takes exactly 2p - 1 of them: the halves can be built side by side.
int32_t left_of(int32_t node) { return node + 1; }
int32_t right_of(int32_t node, int64_t panels) { return node + (int32_t)(panels / 2 * 2); }

// Splits codes into halves of whole panels until one panel is left; writes nodes and permutes `order`.
class Splitter {
 public:
  Splitter(const PanelQuery* at, std::vector<int32_t>& order, int width, const Parallel& parallel)
      : order_(order), width_(width), parallel_(parallel), sorted_(new Key[order.size()]), between_(new Key[order.size()]), at_(at) {}

  void run(PanelTree& tree, int64_t panels) {
    split(tree, 0, {at_, order_.data(), (int64_t)order_.size(), 0}, panels, 0);
  }

 private:
  using Key = int64_t;  // a value, then the code that has it: no two are equal
  static Key key_of(int32_t value, int32_t code) { return (Key)((uint64_t)(uint32_t)value << 32 | (uint32_t)code); }
  static int32_t code_of(Key key) { return (int32_t)(uint32_t)key; }
  static int32_t value_of(Key key) { return (int32_t)(key >> 32); }

  // codes[0..count): places in `at`. first: where they stand among all codes.
  struct Part {
    const PanelQuery* at;
    int32_t* codes;
    int64_t count, first;
  };

  static constexpr int64_t kNearby = 2048;  // codes whose coordinates are brought together: the rest of their tree stays in cache

  void split(PanelTree& tree, int32_t node, const Part& part, int64_t panels, int depth) {
    if (panels == 1) {
      tree.nodes[node] = {{node, node}, 0, 0, (int32_t)(part.first / kPanel)};
      return;
    }
    if (part.at == at_ && part.count <= kNearby && (int64_t)order_.size() > kNearby) return split_nearby(tree, node, part, panels, depth);
    const int64_t half = panels / 2, cut = half * kPanel;
    const int coordinate = widest(part);
    const int32_t value = divide(part, cut, coordinate);
    const int32_t left = left_of(node), right = right_of(node, panels);
    tree.nodes[node] = {{left, right}, value, coordinate, 0};
    const auto side = [&](int64_t i) {
      if (i == 0) split(tree, left, {part.at, part.codes, cut, part.first}, half, depth + 1);
      else split(tree, right, {part.at, part.codes + cut, part.count - cut, part.first + cut}, panels - half, depth + 1);
    };
    if (depth == 0) parallel_(2, 1, [&](int64_t b, int64_t e) { for (int64_t i = b; i < e; ++i) side(i); });
    else side(0), side(1);
  }

  void split_nearby(PanelTree& tree, int32_t node, const Part& part, int64_t panels, int depth) {
    std::unique_ptr<PanelQuery[]> at(new PanelQuery[part.count]);
    std::vector<int32_t> given(part.codes, part.codes + part.count), codes(part.count);
    for (int64_t i = 0; i < part.count; ++i) at[i] = part.at[given[i]];
    std::iota(codes.begin(), codes.end(), 0);
    split(tree, node, {at.get(), codes.data(), part.count, part.first}, panels, depth);
    for (int64_t i = 0; i < part.count; ++i) part.codes[i] = given[codes[i]];
  }

  // Brings the `cut` codes that are smallest in one coordinate to the front; returns the least of the others. Each pass parts what is left
  // by a value about where the cut should be, without a branch, and goes on with the part that the cut lies in.
  int32_t divide(const Part& part, int64_t cut, int coordinate) {
    constexpr int64_t kFew = 24;
    constexpr int kPasses = 24;  // many more than values in any likely order ask for
    Key *left = sorted_.get() + part.first, *spare = between_.get() + part.first;
    for (int64_t i = 0; i < part.count; ++i) left[i] = key_of(part.at[part.codes[i]].grid[coordinate], part.codes[i]);
    int64_t done = 0, count = part.count, over = part.count;  // done: codes that are in front for good; from `over` on others that are not
    for (int pass = 0; count > kFew && pass < kPasses; ++pass) {
      const Key pivot = pivot_of(left, count, cut - done);
      int64_t under = 0, rest = count;
      for (int64_t i = 0; i < count; ++i) {
        const Key k = left[i];
        spare[under] = spare[rest - 1] = k;
        under += k < pivot;
        rest -= k >= pivot;
      }
      const bool ahead = cut - done < under;
      Key* const final = ahead ? spare + under : spare;
      const int64_t n = ahead ? count - under : under;
      if (ahead) over -= n;
      for (int64_t i = 0; i < n; ++i) part.codes[(ahead ? over : done) + i] = code_of(final[i]);
      if (!ahead) done += n;
      count -= n;
      std::swap(left, spare);
      if (!ahead) left += n, spare += n;
    }
    std::nth_element(left, left + (cut - done), left + count);
    for (int64_t i = 0; i < count; ++i) part.codes[done + i] = code_of(left[i]);
    return value_of(left[cut - done]);
  }

  // About where the `at`-th of `count` keys lies.
  static Key pivot_of(const Key* keys, int64_t count, int64_t at) {
    constexpr int kMost = 15;
    const int n = count < 512 ? 5 : kMost;
    Key sample[kMost];
    for (int i = 0; i < n; ++i) {
      const Key k = keys[(2 * i + 1) * count / (2 * n)];
      int j = i;
      for (; j > 0 && sample[j - 1] > k; --j) sample[j] = sample[j - 1];
      sample[j] = k;
    }
    return sample[at * n / count];
  }

  // The coordinate of the largest variance in a sample.
  int widest(const Part& part) const {
    const int64_t step = std::max<int64_t>(1, part.count / 128);
    float sum[kMaxCoordinates] = {}, square[kMaxCoordinates] = {};
    int64_t count = 0;
    const int16_t* origin = part.at[part.codes[0]].grid;
    for (int64_t i = 0; i < part.count; i += step, ++count) {
      const int16_t* c = part.at[part.codes[i]].grid;
      for (int j = 0; j < width_; ++j) {
        const float v = (float)(c[j] - origin[j]);
        sum[j] += v;
        square[j] += v * v;
      }
    }
    double best = -1;
    int chosen = 0;
    for (int j = 0; j < width_; ++j) {
      const double variance = square[j] - (double)sum[j] * sum[j] / (double)count;
      if (variance > best) best = variance, chosen = j;
    }
    return chosen;
  }

  std::vector<int32_t>& order_;
  const int width_;
  const Parallel& parallel_;
  std::unique_ptr<Key[]> sorted_, between_;
  const PanelQuery* const at_;
};

// The tree of panels that are there already, first..first + panels - 1; `mean` [panels] of their points. A node tells its halves apart in
// the coordinate in which they are farthest apart, or overlap the least.
Box find_splits(PanelTree& tree, int32_t node, const std::vector<Box>& mean, int64_t first, int64_t panels, int width) {
  if (panels == 1) {
    tree.nodes[node] = {{node, node}, 0, 0, (int32_t)first};
    return mean[first];
  }
  const int32_t child[2] = {left_of(node), right_of(node, panels)};
  Box half[2] = {find_splits(tree, child[0], mean, first, panels / 2, width),
                 find_splits(tree, child[1], mean, first + panels / 2, panels - panels / 2, width)};
  int best = INT32_MIN, coordinate = 0, under = 0;
  for (int j = 0; j < width; ++j) {
    for (int i = 0; i < 2; ++i) {
      const int gap = half[1 - i].low[j] - half[i].high[j];
      if (gap > best) best = gap, coordinate = j, under = i;
    }
  }
  const int most = half[under].high[coordinate], least = half[1 - under].low[coordinate];
  tree.nodes[node] = {{child[under], child[1 - under]}, (most + least + 1) >> 1, coordinate, 0};
  half[0].add(half[1].low, half[1].high);
  return half[0];
}

}  // namespace

PanelBuild::PanelBuild(const Codes& codes, const Hints& hints, const Parallel& parallel) {
  if (codes.work().dim > kMaxPanelDim) return;
  double total;
  const std::vector<const float*> sample = sample_codes(codes, &total);
  find_basis(codes, sample, total, hints, parallel);
  find_allowances(codes);
  if (captured < kWorthIt) return;
  worth_it = true;
  project_codes(codes, parallel);
  find_order(codes, hints, parallel);
  fill_panels(codes, parallel);
}

// Codes within reach that tell what all are like. The grid spans them and a little more, but for a few that lie far out: what is outside
// is drawn in to it, which brings points closer, never apart.
std::vector<const float*> PanelBuild::sample_codes(const Codes& codes, double* total) {
  const int64_t dim = codes.work().dim, k = (int64_t)codes.searched().size();
  const int64_t n = std::min(k, std::max(kBasisSampleLeast, std::min(kBasisSample, k / 4)));
  std::vector<const float*> sample;
  double largest = 0;
  *total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = codes.work().row(codes.searched()[i * k / n]);
    const double square = kernels().centred_norm(row, codes.centre().data(), dim);
    if (!(square < kFarSquare)) continue;
    largest = std::max(largest, square);
    *total += square;
    sample.push_back(row);
  }
  const double ordinary = 64 * codes.typical_square(), span = sqrt(ordinary > 0 ? std::min(kMargin * largest, ordinary) : largest);
  plan.per_unit = (float)(kGrid / std::max(span, 1e-15));
  return sample;
}

// Principal directions of a sample by subspace iteration, or the caller's. Any orthonormal rows are valid: they decide the cost only.
void PanelBuild::find_basis(const Codes& codes, const std::vector<const float*>& sample, double total, const Hints& hints,
                            const Parallel& parallel) {
  const int64_t dim = codes.work().dim;
  const float* centre = codes.centre().data();
  const int directions = directions_of(dim);
  const int iterated = (int)std::min<int64_t>(directions + kExtra, dim), padded = (std::max(iterated, directions) + 3) / 4 * 4;
  std::vector<double> rows((size_t)padded * dim, 0.0);
  const int wanted = (int)std::min<int64_t>(directions, dim);
  const bool given = hints.basis && hints.directions >= wanted;
  for (int j = 0; j < (given ? wanted : sample.empty() ? 0 : iterated); ++j) {
    const float* row = given ? hints.basis + j * codes.dim() : sample[j * sample.size() / iterated];
    for (int64_t d = 0; d < (given ? codes.dim() : dim); ++d)  // unit vectors for dot have a coordinate more than the caller knows of
      rows[j * dim + d] = !given ? (double)row[d] - centre[d] : std::isfinite(row[d]) ? row[d] : 0.0;
  }
  orthonormalise(rows, given ? wanted : iterated, dim);
  std::vector<float> current(padded * dim), next(kShares * padded * dim);
  for (int step = 0; step < (given ? 1 : kIterations); ++step) {
    for (size_t i = 0; i < current.size(); ++i) current[i] = (float)rows[i];
    std::fill(next.begin(), next.end(), 0.0f);
    parallel(kShares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = s * (int64_t)sample.size() / kShares, last = (s + 1) * (int64_t)sample.size() / kShares;
        kernels().apply_covariance(sample.data() + first, last - first, centre, current.data(), padded, dim, &next[s * padded * dim]);
      }
    });
    for (int s = 1; s < kShares; ++s)
      for (int64_t i = 0; i < padded * dim; ++i) next[i] += next[s * padded * dim + i];
    // Largest images first, so that the leading rows are the principal ones.
    std::vector<int> rank(iterated);
    std::iota(rank.begin(), rank.end(), 0);
    if (!given) {
      std::vector<double> length(iterated, 0.0);
      for (int j = 0; j < iterated; ++j)
        for (int64_t d = 0; d < dim; ++d) length[j] += (double)next[j * dim + d] * next[j * dim + d];
      std::stable_sort(rank.begin(), rank.end(), [&](int a, int b) { return length[a] > length[b]; });
      for (int j = 0; j < iterated; ++j)
        for (int64_t d = 0; d < dim; ++d) rows[j * dim + d] = next[rank[j] * dim + d];
      orthonormalise(rows, iterated, dim);
    }
    // An image is as long as the variance along its direction.
    double kept = 0;
    for (int j = 0; j < wanted; ++j)
      for (int64_t d = 0; d < dim; ++d) kept += rows[j * dim + d] * next[rank[j] * dim + d];
    captured = total > 0 ? kept / total : 0;
  }
  basis_ = aligned_floats((2 * directions + 1) * dim);
  for (int64_t i = 0; i < directions * dim; ++i) basis_[i] = std::isfinite(rows[i]) ? (float)rows[i] : 0.0f;
  std::copy(centre, centre + dim, basis_.get() + directions * dim);
  float* turned = basis_.get() + (directions + 1) * dim;
  for (int64_t d = 0; d < dim; ++d)
    for (int j = 0; j < directions; ++j) turned[d * directions + j] = basis_[j * dim + d];
  plan.coordinates = directions + 1;
  plan.dim = dim;
  plan.basis = turned;
  plan.centre = basis_.get() + directions * dim;
}

void PanelBuild::find_allowances(const Codes& codes) {
  const int64_t dim = plan.dim;
  const int directions = plan.coordinates - 1;
  const double ops = kernels().ops_per_term, defect = orthonormality_defect(basis_.get(), directions, dim);
  const double per_sum = (ops * (std::min<int64_t>(dim, kProjected) + 8) + dim / kProjected + 1) * kUnitRoundoff;  // of a projection
  const double projection = sqrt((double)directions) * (per_sum + 2 * kUnitRoundoff) * 1.1;
  plan.rest_rel = (float)(2 * projection + projection * projection + 4 * defect + 2 * per_sum + 4 * directions * kUnitRoundoff);
  plan.rounding = 2 * 0.51f * sqrtf((float)(directions + 1));
  plan.codes = codes.work().data;
  plan.ld = codes.work().ld;
  plan.row_rel = (float)(2 * projection + projection * projection + 3 * defect + 2 * per_sum +
                         4 * ops * (directions + 6) * kUnitRoundoff);
  plan.code_rel = (float)(plan.row_rel + plan.rest_rel + 1e-6);
  plan.full_rel = (float)(ops * (dim + 24) * kUnitRoundoff);               // at least four sums side by side
  // Unit vectors carry their own rounding, and the contract's double rounding of the similarity shows as a distance too.
  plan.radius = codes.unit_vectors() ? (float)(8 * kUnitRoundoff + sqrt((dim + 8) * 0x1p-50)) : 0.0f;
  plan.tiny = 1e-30f;
}

// The three widest coordinates of a panel's box, and where and how fast they are cut into cells.
void PanelBuild::find_grid(int64_t panel, const int16_t* low, const int16_t* high) {
  Grid& grid = grids_[panel];
  int extent[3] = {-1, -1, -1};
  for (int j = 0; j < plan.coordinates; ++j) {
    const int e = high[j] - low[j];
    for (int i = 0; i < 3; ++i) {
      if (!(e > extent[i])) continue;
      for (int k = 2; k > i; --k) extent[k] = extent[k - 1], grid.coordinate[k] = grid.coordinate[k - 1];
      extent[i] = e, grid.coordinate[i] = (int8_t)j;
      break;
    }
  }
  for (int i = 0; i < 3; ++i) {
    grid.low[i] = low[grid.coordinate[i]];
    grid.per_unit[i] = extent[i] > 0 ? 1.0f / (float)extent[i] : 0.0f;
  }
}

void PanelBuild::cells_of(const PanelQuery* rows, const int32_t* panel, int64_t n, int bits, int32_t* cell) const {
  const int32_t last = (1 << bits) - 1;
  const float cells = (float)(last + 1);
  for (int64_t r = 0; r < n; ++r) {
    if (panel[r] < 0) continue;
    const Grid& grid = grids_[panel[r]];
    int32_t place = panel[r];
    for (int i = 0; i < 3; ++i) {
      const float at = (float)(rows[r].grid[grid.coordinate[i]] - grid.low[i]) * grid.per_unit[i] * cells;
      const int32_t step = (int32_t)std::max(0.0f, std::min((float)last, at));
      // There and back, so that neighbours in the order are neighbours in the box.
      place = (place << bits) | (step ^ (-(place & 1) & last));
    }
    cell[r] = place;
  }
}

void PanelBuild::project_codes(const Codes& codes, const Parallel& parallel) {
  const std::vector<int32_t>& searched = codes.searched();
  points_.reset(new PanelQuery[searched.size()]);
  parallel((int64_t)searched.size(), 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, n; i < end; i += n) {  // codes that follow one another, which most do, are projected together
      for (n = 1; i + n < end && searched[i + n] == searched[i] + n; ++n) {}
      kernels().project(plan, codes.work().row(searched[i]), codes.work().ld, n, &points_[i]);
    }
  });
  // order: positions in `searched` of the codes within reach; turned into codes once the panels are filled.
  order.clear();
  order.reserve(searched.size());
  for (size_t i = 0; i < searched.size(); ++i)
    if (points_[i].norm < (float)kFarSquare) order.push_back((int32_t)i);
}

// The order that a caller remembers, without the codes that take no part here. False, and nothing changed: it is no permutation.
bool PanelBuild::take_order(const Codes& codes, const int64_t* given) {
  const int64_t k = codes.work().count;
  std::vector<int32_t> place(k, -1);  // of a code among the searched ones; -2 once it has been met
  for (int32_t at : order) place[codes.searched()[at]] = at;
  std::vector<int32_t> taken;
  taken.reserve(order.size());
  for (int64_t i = 0; i < k; ++i) {
    if (given[i] < 0 || given[i] >= k || place[given[i]] == -2) return false;
    if (place[given[i]] >= 0) taken.push_back(place[given[i]]);
    place[given[i]] = -2;
  }
  order = std::move(taken);
  return true;
}

void PanelBuild::find_order(const Codes& codes, const Hints& hints, const Parallel& parallel) {
  const int64_t panels = ((int64_t)order.size() + kPanel - 1) / kPanel;
  tree.nodes.resize(std::max<int64_t>(1, 2 * panels - 1));
  if (panels == 0) {
    tree.nodes[0] = {{0, 0}, 0, 0, 0};
    return;
  }
  if (hints.order && take_order(codes, hints.order)) {
    std::vector<Box> mean(panels);
    parallel(panels, 64, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t n = std::min<int64_t>(kPanel, (int64_t)order.size() - p * kPanel);
        int32_t sum[kMaxCoordinates] = {};
        for (int64_t i = 0; i < n; ++i)
          for (int j = 0; j < kMaxCoordinates; ++j) sum[j] += points_[order[p * kPanel + i]].grid[j];
        Box::Places point = {};
        for (int j = 0; j < kMaxCoordinates; ++j) point[j] = (int16_t)(sum[j] / n);
        mean[p].add(point, point);
      }
    });
    find_splits(tree, 0, mean, 0, panels, plan.coordinates);
  } else {
    Splitter(points_.get(), order, plan.coordinates, parallel).run(tree, panels);
  }
  while ((int64_t)1 << tree.depth < panels) ++tree.depth;  // halves differ by one panel at most
}

void PanelBuild::fill_panels(const Codes& codes, const Parallel& parallel) {
  const int64_t panels = ((int64_t)order.size() + kPanel - 1) / kPanel, pairs = plan.coordinates / 2;
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
  std::vector<Box> group_box(blocks * kPanelGroup);
  parallel(groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      for (int i = 0; i < kPanelGroup; ++i) {
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
          constexpr int64_t kAhead = 8;  // codes lie anywhere
          if (at + kAhead < (int64_t)order.size()) __builtin_prefetch(&points_[order[at + kAhead]]);
          const PanelQuery& c = points_[order[at]];
          Box::Places point = {};
          memcpy(&point, c.grid, sizeof(c.grid));
          all.add(point, point);
          const Box::Places negated = -point;
          int32_t square = 0;
          for (int j = 0; j < kMaxCoordinates; ++j) square += (int32_t)point[j] * point[j];
          for (int64_t j = 0; j < pairs; ++j) memcpy(to + j * kPanel, reinterpret_cast<const char*>(&negated) + 4 * j, 4);
          start[at] = square >> 1;
          id_[at] = codes.searched()[order[at]];
        }
        all.store((int)pairs, i, low + g * box, high + g * box);
        group_box[g].add(all.low, all.high);
        if (p < panels) find_grid(p, reinterpret_cast<const int16_t*>(&all.low), reinterpret_cast<const int16_t*>(&all.high));
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
