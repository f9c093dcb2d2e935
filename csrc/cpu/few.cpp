#include "few.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <cfloat>

#include "nearest.h"

namespace vqfast {
namespace {

constexpr int64_t kTileBytes = 256 << 10;   // rows that pass over the codebook together: part of a second-level cache
// Turning a panel around costs about as much as multiplying this many coordinates of it by a row, measured; many rows share it.
constexpr int64_t kDirectDims = 32, kDirectRows = 16;
constexpr int64_t kMostRows = 2048;         // beyond, a codebook that is turned around once is read faster
constexpr int kSpreadCodes = 16;
constexpr double kManyDirections = 8;       // measured: from about 5 on, panels gain nothing for kMostRows rows
constexpr int64_t kMostDims = 4096;         // beyond, a panel would leave the second-level cache
constexpr int64_t kShareRows = 64;          // for which a thread turns the codebook around by itself
constexpr double kTaskProducts = 0x1p20;    // coordinates of rows times codes that are worth a thread

bool is_finite(const float* row, int64_t dim) {
  bool finite;
  kernels().inspect(row, dim, &finite);
  return finite;
}

class FewSearch {
 public:
  FewSearch(const ExactCodes& codes, int64_t count, const Parallel& parallel) : codes_(codes), parallel_(parallel) {
    plan_.count = count;
    plan_.unit = codes.metric == kCosine;
    plan_.half = codes.metric == kL2 ? 0.5f : 0.0f;
  }
  bool find_centre();
  double directions() const;
  // How many candidates were settled in all, or -1.
  int64_t run(const Rows& rows, double* score, int64_t* index) const;

 private:
  enum class Kind { kPlain, kZero, kNotFinite };
  struct Block;
  int sample_codes(float* sample, int64_t most) const;
  int64_t search_block(const Rows& rows, int64_t begin, int64_t count, int64_t threads, double* score, int64_t* index) const;
  Kind unit_row(const float* exact, float* work) const;
  void lay_out(const std::vector<const float*>& from, Block* block) const;
  bool fill(const Rows& rows, int64_t begin, Block* block) const;
  void set_allowances(Block* block) const;
  int64_t search(const Block& block, int64_t threads, double* score, int64_t* index) const;

  const ExactCodes& codes_;
  const Parallel& parallel_;
  FewPlan plan_ = {};               // but for what a block of rows decides
  std::vector<float> origin_, shift_;  // what is subtracted from rows; added to codes, minus a centre
  double typical_square_ = 0, centre_norm_ = 0;
};

// Rows that pass over the codebook together.
struct FewSearch::Block {
  FewPlan plan;
  int64_t count, padded;
  std::unique_ptr<float[]> values;  // as FewPlan says
  std::vector<const float*> exact;
  std::vector<Kind> kind;
  std::vector<double> square;       // of what the plan sees, at most
  std::vector<float> slack, limits;
};

// ---- the codebook ------------------------------------------------------------------------------------------------------------

// Up to `most` finite codes, evenly spaced and more of them between where some are not; of unit length for cosine.
int FewSearch::sample_codes(float* sample, int64_t most) const {
  const int64_t k = plan_.count, dim = codes_.dim, apart = (k + most - 1) / most;
  int found = 0;
  for (int64_t offset = 0; offset < std::min<int64_t>(apart, 4); ++offset) {
    for (int64_t code = offset * apart / 4; code < k && found < most; code += apart) {
      const float* row = codes_.codes + code * codes_.ld;
      if (!is_finite(row, dim)) continue;
      const double square = plan_.unit ? square_of(row, dim) : 1.0;
      if (!(square > 0)) continue;
      const double factor = 1.0 / sqrt(square);
      float* to = sample + found++ * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] = (float)(row[d] * factor);
    }
  }
  return found;
}

// Any centre is valid, a good one makes the bounds tight. The same codes say how large codes are; false where that asks for scaling,
// which this road has not.
bool FewSearch::find_centre() {
  const int64_t dim = codes_.dim;
  std::vector<float> sample(kCentreRows * dim);
  const int found = sample_codes(sample.data(), kCentreRows);
  if (found == 0) return false;
  for (int i = found; i < kCentreRows; ++i) memcpy(&sample[i * dim], &sample[i % found * dim], dim * sizeof(float));
  shift_.resize(dim);
  const float* rows[kCentreRows];
  for (int i = 0; i < kCentreRows; ++i) rows[i] = &sample[i * dim];
  centre_of(rows, dim, shift_.data());
  if (codes_.metric == kL2) origin_ = shift_;
  else origin_.assign(dim, 0.0f);
  for (float& s : shift_) s = -s;
  double square[kCentreRows];
  for (int i = 0; i < kCentreRows; ++i) {
    for (int64_t d = 0; d < dim; ++d) sample[i * dim + d] += shift_[d];
    square[i] = square_of(&sample[i * dim], dim);
  }
  std::sort(square, square + kCentreRows);
  typical_square_ = square[kCentreRows * 3 / 4];
  centre_norm_ = sqrt(square_of(shift_.data(), dim));
  plan_.shift = shift_.data();
  return typical_square_ > 0x1p-30 && typical_square_ < 0x1p30;
}

// How many directions the codes spread over: (tr S)^2 / tr S^2 of their covariance S, from a sample. Equal variance in n directions
// gives n, and p directions that hold a share s of it p / s^2 at most.
double FewSearch::directions() const {
  const int64_t dim = codes_.dim;
  std::vector<float> sample(kSpreadCodes * dim);
  const int found = sample_codes(sample.data(), kSpreadCodes);
  // About their own mean: the centre's error would be a direction that all of them share.
  for (int64_t d = 0; d < dim; ++d) {
    double mean = 0;
    for (int i = 0; i < found; ++i) mean += sample[i * dim + d] / (double)found;
    for (int i = 0; i < found; ++i) sample[i * dim + d] = (float)(sample[i * dim + d] - mean);
  }
  double square = 0, product = 0;
  for (int i = 0; i < found; ++i) {
    const float* row = &sample[i * dim];
    square += square_of(row, dim) / found;
    for (int j = 0; j < i; ++j) {
      const double dot = product_of(row, &sample[j * dim], dim);
      product += 2 * dot * dot / (found * (found - 1.0));
    }
  }
  return product > 0 ? square * square / product : 0;
}

// ---- the rows ----------------------------------------------------------------------------------------------------------------

// Of cosine and dot the plan sees rows of unit length; one that has none is left out.
FewSearch::Kind FewSearch::unit_row(const float* exact, float* work) const {
  const double square = square_of(exact, codes_.dim);  // squares of float32 do not overflow
  if (square == 0) return Kind::kZero;
  if (!(square < INFINITY)) return Kind::kNotFinite;
  const double factor = 1.0 / sqrt(square);
  for (int64_t d = 0; d < codes_.dim; ++d) work[d] = (float)(exact[d] * factor);
  return Kind::kPlain;
}

// Rows less the origin as the kernels read them, and the squares of what they are then, which a tile's are not less than.
void FewSearch::lay_out(const std::vector<const float*>& from, Block* block) const {
  const int64_t dim = codes_.dim, per_tile = kernels().rows_per_tile;
  block->values.reset(new float[block->padded * dim + kMostTileRows]);
  float* to = block->values.get();
  if (block->plan.direct) {
    for (int64_t i = 0; i < block->count; ++i, to += dim) {
      for (int64_t d = 0; d < dim; ++d) to[d] = from[i][d] - origin_[d];
      block->square[i] = square_of(to, dim);
    }
    return;
  }
  std::unique_ptr<float[]> last(new float[per_tile * dim + kMostTileRows]);  // a tile of which fewer rows stay
  const float* rows[kMostTileRows];
  float square[kMostTileRows];
  for (int64_t i = 0; i < block->padded; i += per_tile, to += per_tile * dim) {
    const int64_t width = std::min(per_tile, block->padded - i);
    for (int64_t r = 0; r < per_tile; ++r) rows[r] = r < width ? from[i + r] : origin_.data();
    kernels().to_tile(rows, origin_.data(), dim, width < per_tile ? last.get() : to, square);
    if (width < per_tile)
      for (int64_t d = 0; d < dim; ++d) memcpy(to + d * width, &last[d * per_tile], width * sizeof(float));
    for (int64_t r = 0; r < width; ++r) block->square[i + r] = square[r] * (1.0 + (double)(dim + 8) * 0x1p-23);  // a sum in float32
  }
}

// False: a row is out of float32's reach.
bool FewSearch::fill(const Rows& rows, int64_t begin, Block* block) const {
  const int64_t dim = codes_.dim, per_tile = kernels().rows_per_tile, narrow = kernels().narrow_tile, count = block->count;
  const int64_t rest = count % per_tile;
  block->padded = block->plan.direct ? count : count - rest + (rest + narrow - 1) / narrow * narrow;
  block->exact.assign(block->padded, nullptr);
  block->kind.assign(count, Kind::kPlain);
  block->square.assign(block->padded, 0.0);
  std::vector<float> unit(codes_.metric == kL2 ? 0 : count * dim);
  std::vector<const float*> from(block->padded, origin_.data());
  for (int64_t i = 0; i < count; ++i) {
    from[i] = block->exact[i] = rows.row(begin + i);
    if (codes_.metric == kL2) continue;
    block->kind[i] = unit_row(block->exact[i], &unit[i * dim]);
    from[i] = block->kind[i] == Kind::kPlain ? &unit[i * dim] : origin_.data();
  }
  lay_out(from, block);
  for (int64_t i = 0; i < count; ++i) {
    if (block->square[i] < kWildSquare) continue;
    if (is_finite(block->exact[i], dim)) return false;
    block->kind[i] = Kind::kNotFinite;
  }
  set_allowances(block);
  return true;
}

// docs/SEARCH.md, "Few rows".
void FewSearch::set_allowances(Block* block) const {
  double total = 0;
  for (int64_t i = 0; i < block->count; ++i) total += block->kind[i] == Kind::kPlain ? block->square[i] : 0.0;
  const int64_t dim = codes_.dim;
  const double u = 0x1p-24, ops = kernels().ops_per_term;
  const double roundings = (ops * (dim + 4) + 8) * u, error = 1.01 * roundings / (1 - roundings);
  const double ratio = total > 0 ? sqrt(typical_square_ / (total / block->count)) : 1.0;
  const double balance = std::min(0x1p30, std::max(0x1p-30, ratio));
  block->plan.of_code = (float)(1.01 * error * (2.0 * plan_.half + 0.5 / balance));
  const double of_formula = (dim + 8) * 0x1p-52 * (codes_.metric == kDot ? 1.0 + centre_norm_ : 1.0);
  const double of_norm = plan_.unit ? 1.01 * ((ops * (dim / kernels().lanes + 2) + 6) / 2 + 4) * u : 0.0;
  block->slack.assign(block->padded, 0.0f);
  block->limits.assign(block->padded, -INFINITY);
  for (int64_t i = 0; i < block->count; ++i) {
    if (block->kind[i] != Kind::kPlain) continue;
    block->slack[i] = (float)(1.01 * ((error * balance * 0.5 + of_formula) * block->square[i] + of_norm) + 1e-30);
    block->limits[i] = FLT_MAX;
  }
}

// ---- the search --------------------------------------------------------------------------------------------------------------

// The codes are shared out to the threads.
int64_t FewSearch::search(const Block& block, int64_t threads, double* score, int64_t* index) const {
  const Kernels& k = kernels();
  const int64_t panels = (plan_.count + kPanel - 1) / kPanel, n = block.padded;
  const double products = (double)n * plan_.count * codes_.dim;
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>({threads, panels, (int64_t)(products / kTaskProducts)}));
  std::unique_ptr<Row[]> rows(new Row[tasks * n]);  // a task has a part of the codes, and its own account of every row
  std::vector<int64_t> settled(tasks);
  parallel_(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Row* own = rows.get() + t * n;
      for (int64_t i = 0; i < n; ++i) {
        own[i].exact = block.exact[i];
        own[i].best = INFINITY;
        own[i].index = INT64_MAX;
        own[i].slack = block.slack[i];
        own[i].count = 0;
      }
      std::vector<float> limits = block.limits;
      std::unique_ptr<float[]> scratch(new float[std::max(codes_.dim, n) * kPanel]);
      const int64_t first = panels * t / tasks * kPanel, last = std::min(plan_.count, panels * (t + 1) / tasks * kPanel);
      settled[t] = k.few(block.plan, codes_, first, last, block.values.get(), n, limits.data(), own, scratch.get());
    }
  });
  int64_t total = 0;
  for (int64_t of_task : settled) {
    if (of_task < 0) return -1;
    total += of_task;
  }
  int64_t lowest = 0;  // what rows without direction get
  while (!is_finite(codes_.codes + lowest * codes_.ld, codes_.dim)) ++lowest;  // the sample holds a finite one
  for (int64_t i = 0; i < block.count; ++i) {
    Row* best = &rows[i];
    for (int64_t t = 1; t < tasks; ++t) {
      Row* other = &rows[t * n + i];
      if (other->best < best->best || (other->best == best->best && other->index < best->index)) best = other;
    }
    const Kind kind = block.kind[i];
    score[i] = kind == Kind::kPlain ? best->best : kind == Kind::kZero ? 0.0 : NAN;
    index[i] = kind == Kind::kPlain ? best->index : kind == Kind::kZero ? lowest : 0;
  }
  return total;
}

int64_t FewSearch::search_block(const Rows& rows, int64_t begin, int64_t count, int64_t threads, double* score, int64_t* index) const {
  Block block;
  block.plan = plan_;
  block.plan.direct = count <= std::min<int64_t>(kDirectRows, codes_.dim / kDirectDims);
  block.count = count;
  return fill(rows, begin, &block) ? search(block, threads, score + begin, index + begin) : -1;
}

int64_t FewSearch::run(const Rows& rows, double* score, int64_t* index) const {
  const int64_t dim = codes_.dim, per_tile = kernels().rows_per_tile, threads = parallel_.threads;
  const int64_t tiles = std::max<int64_t>(1, (rows.count + per_tile - 1) / per_tile);
  const int64_t most = std::max<int64_t>(1, kTileBytes / (dim * per_tile * (int64_t)sizeof(float)));  // tiles of a block
  // Threads share rows where each finds enough of them, which they then lay out side by side too, else codes.
  const double products = (double)rows.count * plan_.count * dim;
  const bool share_rows = rows.count >= threads * kShareRows && products >= threads * kTaskProducts;
  const int64_t at_least = std::max((tiles + most - 1) / most, share_rows ? threads : 1);
  const int64_t per_block = (tiles + at_least - 1) / at_least * per_tile, blocks = (rows.count + per_block - 1) / per_block;
  std::vector<int64_t> settled(blocks, -1);
  const auto search_one = [&](int64_t i, int64_t code_threads) {
    settled[i] = search_block(rows, i * per_block, std::min(per_block, rows.count - i * per_block), code_threads, score, index);
    return settled[i] >= 0;
  };
  if (share_rows) {
    parallel_.share(blocks, [&](auto next) {
      for (int64_t i = next(); i < blocks && search_one(i, 1); i = next()) {}
    });
  } else {
    for (int64_t i = 0; i < blocks && search_one(i, threads); ++i) {}
  }
  int64_t total = 0;
  for (int64_t of_block : settled) {
    if (of_block < 0) return -1;
    total += of_block;
  }
  return total;
}

}  // namespace

Few few_rows(int64_t rows, int64_t codes, int64_t dim) {
  // The other road is up to twice as fast where it looks at bytes first.
  const int64_t most = kernels().bytes && dim >= kLeastByteDim ? kMostRows / 2 : kMostRows;
  if (dim > kMostDims || rows > most) return Few::kNo;
  // Measured: up to so many rows other roads cost more by what they prepare, even where they then pass over most codes.
  if (rows <= 64 + 24576 / dim) return Few::kYes;
  return panels_may_pay(rows, codes, dim) ? Few::kIfSpread : Few::kYes;  // else the other road is the dense one
}

int64_t search_few(const ExactCodes& codes, int64_t count, const Rows& rows, Few few, const Parallel& parallel, double* score,
                   int64_t* index) {
  FewSearch search(codes, count, parallel);
  if (!search.find_centre()) return -1;
  if (few == Few::kIfSpread && search.directions() < kManyDirections) return -1;
  return search.run(rows, score, index);
}

}  // namespace vqfast
