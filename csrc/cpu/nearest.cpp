#include "nearest.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <cfloat>

#include "few.h"

namespace vqfast {
namespace {

// Tiles of rows that share one pass over the panels, which may come from memory: a quarter of a second-level cache. Less would be read
// from the first level, but wide codebooks too often.
constexpr int64_t kBlockBytes = 256 << 10;
constexpr int64_t kBlockRows = 2048, kMostBlockRows = 8192;  // that are ordered together: few stay in the second-level cache, but
constexpr int64_t kRowsPerPanel = 32;                        // many codes ask for many, so that neighbours in the order are close
constexpr int64_t kPilotRows = 64;   // rows whose visits decide the road
constexpr double kHintsPay = 1 / 3.0;  // of what the dense road costs: more, and a search without hints is weighed against

// What one row of a given work dimension looks like to the plans: scaled, or of unit length.
// False where a unit vector does not exist.
bool work_row(const Codes& codes, const float* exact, float* out) {
  const int64_t dim = codes.dim();
  if (!codes.unit_vectors()) {
    for (int64_t d = 0; d < dim; ++d) out[d] = exact[d] * codes.scale();
    return true;
  }
  const double square = square_of(exact, dim), factor = square > 0 ? (double)codes.scale() / sqrt(square) : 0.0;
  for (int64_t d = 0; d < dim; ++d) out[d] = (float)(exact[d] * factor);
  if (codes.metric() == kDot) out[dim] = 0.0f;
  return square > 0;
}

bool rows_need_work(const Codes& codes) { return codes.unit_vectors() || codes.scale() != 1.0f; }

void start_row(Row* row, const float* exact) {
  row->exact = exact;
  row->best = INFINITY;
  row->index = INT64_MAX;
  row->count = 0;
}

// What a row costs on the dense road in floats, in fused multiplications and additions of vectors of 16 codes: one for each dimension,
// and what two cost to begin and to compare.
double dense_cost(int64_t codes, int64_t dim) { return (double)codes * (dim + 2) / 16.0; }

// What bytes cost at least, as a part of that: 64 products an operation, then what 10 cost to bound 16 codes.
constexpr double least_of_bytes(int64_t dim) { return (dim / 4.0 + 10) / (dim + 2); }
static_assert(least_of_bytes(kLeastByteDim) < 1 && least_of_bytes(kLeastByteDim - 1) >= 1, "where bytes begin to win");

// distance of a score: the contract's line 1. Nearly always a sum of squares in any order shows what it is in float32.
float distance_of(const ExactCodes& codes, const float* exact, double score) {
  if (codes.metric != kCosine || isnan(score)) return (float)score;
  const double square = square_of(exact, codes.dim), similarity = square > 0 ? score / sqrt(square) : 0.0;
  const double error = (fabs(similarity) + 1.0) * (double)(codes.dim + 16) * 0x1p-52;
  const float least = (float)(1.0 + similarity - error), most = (float)(1.0 + similarity + error);
  if (least == most) return least;
  double norm = 0;
  for (int64_t d = 0; d < codes.dim; ++d) norm += (double)exact[d] * (double)exact[d];
  return (float)(norm > 0 ? 1.0 + score / sqrt(norm) : 1.0);
}

PanelCounts sum_of(const std::vector<PanelCounts>& counts) {
  PanelCounts total = {};
  for (const PanelCounts& c : counts) {
    total.rows += c.rows;
    total.groups += c.groups;
    total.panels += c.panels;
    total.evaluations += c.evaluations;
    total.candidates += c.candidates;
  }
  return total;
}

}  // namespace

bool panels_may_pay(int64_t rows, int64_t codes, int64_t dim) {
  return dim <= kMaxPanelDim && codes >= 128 && rows >= 64 && (double)rows * codes * dim >= 0x1p24;
}

NearestSearch::NearestSearch(const Codes& codes, const Rows& rows, const Hints& hints, const Parallel& parallel, Road road)
    : codes_(codes), parallel_(parallel) {
  if (codes.searched().empty()) return;
  double panels = road == Road::kAuto || road == Road::kPanels ? panels_cost(rows, hints, road == Road::kPanels) : INFINITY;
  if (panels_ && !(panels < kHintsPay) && (hints.order || hints.basis)) {
    // They may be to blame for a search that costs this much, beside which preparing it once more is little.
    std::unique_ptr<PanelBuild> hinted = std::move(panels_);
    const double without = panels_cost(rows, Hints{}, false);
    if (without < panels) panels = without;
    else panels_ = std::move(hinted);
  }
  const bool bytes_may_win = road == Road::kBytes || (road == Road::kAuto && panels > least_of_bytes(codes.work().dim));
  const double bytes = bytes_may_win ? bytes_cost(rows, road == Road::kBytes) : INFINITY;
  report_.road = bytes < std::min(1.0, panels) ? Road::kBytes : panels < 1 ? Road::kPanels : Road::kDense;
  if (report_.road != Road::kBytes) bytes_.reset();
  if (report_.road != Road::kPanels) panels_.reset();
  if (panels_) report_.panels_count = panels_->plan.panels_count;
  if (report_.road != Road::kDense) return;
  double square = 0;
  int64_t counted = 0;
  std::vector<float> work(codes.work().dim);
  for (int64_t i = 0; i < std::min<int64_t>(rows.count, 64); ++i) {
    work_row(codes, rows.row(i * rows.count / std::min<int64_t>(rows.count, 64)), work.data());
    const double s = kernels().centred_norm(work.data(), codes.centre().data(), codes.work().dim);
    if (s < kWildSquare) square += s, ++counted;
  }
  dense_.reset(new DenseBuild(codes, counted ? square / counted : 0, parallel));
}

NearestSearch::~NearestSearch() = default;

// What the pruned road does for rows that are evenly spaced, one by one.
PanelCounts NearestSearch::pilot(const Rows& rows) const {
  const int64_t n = std::min(rows.count, kPilotRows), dim = codes_.work().dim;
  const PanelPlan& plan = panels_->plan;
  std::vector<float> work(n * dim);
  std::vector<const float*> exact;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = rows.row(i * rows.count / n);
    if (work_row(codes_, row, &work[exact.size() * dim])) exact.push_back(row);
  }
  PanelQuery query[kPilotRows];
  int32_t first[kPilotRows];
  std::vector<PanelCounts> counts(kPilotRows);
  kernels().project(plan, work.data(), dim, (int64_t)exact.size(), query);
  panels_->tree.panels_of(query, (int64_t)exact.size(), first);
  parallel_((int64_t)exact.size(), kPilotRows / 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!(query[i].norm < (float)kWildSquare)) continue;  // NaN too
      const int32_t zero = 0;
      double score;
      int64_t index;
      kernels().panels(plan, codes_.exact(), exact[i], 0, &work[i * dim], 0, &query[i], &zero, &first[i], nullptr, 1, &score, &index,
                       &counts[i]);
    }
  });
  return sum_of(counts);
}

// What the pruned road costs, as a part of the dense one in floats; +inf where it has no panels. From the size and from counts on a few
// rows, never from a clock: the same data takes the same road on every machine of a level.
double NearestSearch::panels_cost(const Rows& rows, const Hints& hints, bool wanted) {
  const int64_t k = (int64_t)codes_.searched().size(), dim = codes_.work().dim;
  if (!wanted && !panels_may_pay(rows.count, k, dim)) return INFINITY;
  panels_.reset(new PanelBuild(codes_, hints, parallel_));
  if (!panels_->worth_it) return INFINITY;
  if (wanted) return 0;
  const PanelCounts counts = pilot(rows);
  if (counts.rows == 0) return INFINITY;
  // In operations of the dense road on 16 codes. What rows visit together is more than what each visits alone, as the pilot's do, but
  // then costs less a row: the two are taken to balance.
  const PanelPlan& plan = panels_->plan;
  const double vectors = kPanel / 16.0, pairs = plan.coordinates / 2.0;
  const double panel = kernels().pair_cost * pairs * vectors + 10, evaluation = 2.0 * dim / 16.0 + 40, group = 6.0 * plan.coordinates;
  const double first = (double)counts.rows * std::min<int64_t>(kFirstPanels, plan.panels_count);
  const double pruned = (counts.panels + first) * panel + counts.evaluations * evaluation + counts.candidates * 2.0 * dim +
                        (counts.groups + counts.rows * (1.0 + plan.groups_count / 16.0)) * group;
  return pruned / ((double)counts.rows * dense_cost(k, dim));
}

// The same of the dense road in bytes.
double NearestSearch::bytes_cost(const Rows& rows, bool wanted) {
  const int64_t k = (int64_t)codes_.searched().size(), dim = codes_.work().dim;
  if (!kernels().bytes || dim > kMaxPanelDim) return INFINITY;
  if (!wanted && (k < 128 || rows.count < 256 || dim < kLeastByteDim)) return INFINITY;
  bytes_.reset(new ByteBuild(codes_, parallel_));
  if (!bytes_->worth_it) return INFINITY;
  if (wanted) return 0;
  const int64_t n = std::min(rows.count, kPilotRows);
  Rows some;
  some.data = rows.data;
  some.ld = rows.ld * (rows.count / n);
  some.count = n;
  some.dim = rows.dim;
  std::vector<double> score(n);
  std::vector<int64_t> index(n);
  run_dense(some, score.data(), index.data());
  const double settled = (double)report_.counts.candidates / n;
  report_.counts = {};
  return least_of_bytes(dim) + settled * (1.5 * dim + 64) / dense_cost(k, dim);  // measured
}

void NearestSearch::run(const Rows& rows, const int64_t* guess, double* score, int64_t* index) {
  if (codes_.usable().empty()) {
    std::fill(score, score + rows.count, NAN);
    std::fill(index, index + rows.count, 0);
  } else if (panels_) {
    run_panels(rows, guess, score, index);
  } else {
    run_dense(rows, score, index);
  }
}

// Rows that no plan can take: not finite, without direction, or too far out for float32.
void NearestSearch::settle_alone(const float* exact, double* score, int64_t* index) const {
  bool finite;
  kernels().inspect(exact, codes_.dim(), &finite);
  if (!finite) {
    *score = NAN;
    *index = 0;
  } else if (codes_.unit_vectors() && square_of(exact, codes_.dim()) == 0.0) {
    *score = 0.0;  // as every code does
    *index = codes_.usable().front();
  } else {
    brute_force(exact, score, index);
  }
}

void NearestSearch::brute_force(const float* exact, double* score, int64_t* index) const {
  Row row;
  start_row(&row, exact);
  for (int32_t code : codes_.usable()) {
    row.candidate[row.count] = code;
    row.score[row.count++] = 0.0f;
    if (row.count == kCandidates) kernels().settle(codes_.exact(), &row, 1);
  }
  kernels().settle(codes_.exact(), &row, 1);
  *score = row.best;
  *index = row.index;
}

// Rows of a block, centred and laid out for the dense kernels: floats, or bytes with what scales them.
struct NearestSearch::Tiles {
  Tiles(int64_t count, int64_t dim, bool bytes, bool needs_work)
      : floats(new float[bytes ? 1 : count * dim + kMostTileRows]),
        words(new int32_t[bytes ? count * ((dim + 3) / 4) : 1]()),
        rows(new Row[count]),
        steps(count),
        limits(count),
        work(needs_work ? kernels().rows_per_tile * dim : 0) {}
  std::unique_ptr<float[]> floats;
  std::unique_ptr<int32_t[]> words;
  std::unique_ptr<Row[]> rows;
  std::vector<ByteRow> steps;
  std::vector<float> limits, work;
};

// `count` rows become a tile of the block; what is missing is padded. Padding, rows that are not finite and wild rows collect nothing.
void NearestSearch::fill(const Rows& rows, int64_t first, int64_t count, int64_t tile, Tiles* tiles) const {
  const Kernels& k = kernels();
  const int64_t dim = codes_.work().dim, per_tile = k.rows_per_tile, words = (dim + 3) / 4;
  const float* centre = codes_.centre().data();
  const float* from[kMostTileRows];
  float square[kMostTileRows];
  for (int64_t r = 0; r < per_tile; ++r) {
    from[r] = centre;
    if (r >= count) continue;
    const float* exact = rows.row(first + r);
    if (!rows_need_work(codes_)) from[r] = exact;
    else if (float* work = tiles->work.data() + r * dim; work_row(codes_, exact, work)) from[r] = work;
  }
  float* floats = tiles->floats.get() + tile * per_tile * dim;
  if (!bytes_) k.to_tile(from, centre, dim, floats, square);
  for (int64_t r = 0; r < per_tile; ++r) {
    const int64_t at = tile * per_tile + r;
    double slack = 0;
    if (bytes_) {
      ByteRow* steps = &tiles->steps[at];
      *steps = k.to_bytes(from[r], centre, dim, tiles->words.get() + tile * per_tile * words + r, per_tile);
      square[r] = steps->length;
      if (!(square[r] < kWildSquare)) *steps = {};
      slack = in_steps(*bytes_, steps);
    } else if (dense_) {
      slack = dense_->error * dense_->balance * 0.5 * square[r] * (1.01 + dim * 0x1p-24);  // the square is a float32 sum
    }
    const bool takes_part = from[r] != centre && square[r] < kWildSquare;
    add_row(r < count ? rows.row(first + r) : nullptr, takes_part, square[r], slack, at, tiles);
    for (int64_t d = 0; !takes_part && !bytes_ && d < dim; ++d) floats[d * per_tile + r] = 0.0f;
  }
}

// Row number `at` of the block, |row - centre|^2 of which is `square`.
void NearestSearch::add_row(const float* exact, bool takes_part, double square, double slack, int64_t at, Tiles* tiles) const {
  Row* row = &tiles->rows[at];
  start_row(row, exact);
  row->slack = 0;
  tiles->limits[at] = -INFINITY;
  if (exact && !takes_part) settle_alone(exact, &row->best, &row->index);
  if (!takes_part) return;
  // The contract's own rounding in float64 decides between codes that are equally far in truth.
  const double of_formula = (codes_.work().dim + 8) * 0x1p-52 * square;
  const double unit_slack = codes_.unit_vectors() ? 4 * (8 * 0x1p-24 + sqrt((codes_.work().dim + 8) * 0x1p-50)) : 0.0;
  if (dense_ || bytes_) tiles->limits[at] = FLT_MAX, row->slack = (float)(slack + of_formula + unit_slack + 1e-30);
  for (int32_t code : codes_.always()) {
    row->candidate[row->count] = code;
    row->score[row->count++] = -FLT_MAX;
    if (row->count == kCandidates) kernels().settle(codes_.exact(), row, 1);
  }
}

void NearestSearch::run_dense(const Rows& rows, double* score, int64_t* index) {
  const Kernels& k = kernels();
  const int64_t dim = codes_.work().dim, per_tile = k.rows_per_tile;
  const int64_t tiles_count = (rows.count + per_tile - 1) / per_tile;
  const int64_t fitting = std::min<int64_t>(64, kBlockBytes / (dim * per_tile * (int64_t)sizeof(float)));
  const int64_t per_block = std::max<int64_t>(1, std::min<int64_t>(fitting, tiles_count / std::max(1, 2 * parallel_.threads)));
  const int64_t blocks = (tiles_count + per_block - 1) / per_block;
  std::vector<int64_t> settled(blocks, 0);
  parallel_.share(blocks, [&](auto next) {
    Tiles tiles(per_block * per_tile, dim, bytes_ != nullptr, rows_need_work(codes_));
    for (int64_t block = next(); block < blocks; block = next()) {
      const int64_t first = block * per_block * per_tile, last = std::min(rows.count, first + per_block * per_tile);
      const int64_t used = (last - first + per_tile - 1) / per_tile;
      for (int64_t t = 0; t < used; ++t) {
        const int64_t from = first + t * per_tile;
        fill(rows, from, std::min(per_tile, last - from), t, &tiles);
      }
      if (bytes_) {
        settled[block] = k.bytes(bytes_->plan, codes_.exact(), tiles.words.get(), tiles.steps.data(), used, tiles.limits.data(),
                                 tiles.rows.get());
      } else if (dense_) {
        k.dense(dense_->plan, codes_.exact(), tiles.floats.get(), used, tiles.limits.data(), tiles.rows.get());
      } else {
        k.settle(codes_.exact(), tiles.rows.get(), (int)(used * per_tile));
      }
      for (int64_t r = first; r < last; ++r) {
        score[r] = tiles.rows[r - first].best;
        index[r] = tiles.rows[r - first].index;
      }
    }
  });
  for (int64_t n : settled) report_.counts.candidates += n;
  report_.counts.rows += rows.count;
}

// What a thread keeps of the rows it searches together.
struct NearestSearch::Block {
  std::unique_ptr<PanelQuery[]> queries;
  std::unique_ptr<float[]> work;        // [rows, dim] where rows are not searched as they are
  std::vector<int32_t> first, cell, begin_of, order;
  std::vector<int64_t> guess;
};

// Coordinates and home panel of each row; rows that no plan can take are settled at once and have none.
void NearestSearch::describe(const Rows& rows, int64_t from_row, int64_t count, Block* block, double* score, int64_t* index) const {
  const int64_t dim = codes_.work().dim;
  constexpr int64_t kSome = 16;  // rows that take a step together: they stay in cache
  for (int64_t i = 0; i < count; i += kSome) {
    const int64_t n = std::min(kSome, count - i);
    const float* from = rows.row(from_row + i);
    int64_t ld = rows.ld;
    bool has_vector[kSome];
    std::fill_n(has_vector, kSome, true);
    if (block->work) {
      float* to = block->work.get() + i * dim;
      for (int64_t r = 0; r < n; ++r) has_vector[r] = work_row(codes_, rows.row(from_row + i + r), to + r * dim);
      from = to;
      ld = dim;
    }
    PanelQuery* query = &block->queries[i];
    kernels().project(panels_->plan, from, ld, n, query);
    panels_->tree.panels_of(query, n, &block->first[i]);
    for (int64_t r = 0; r < n; ++r) {
      if (has_vector[r] && query[r].norm < (float)kWildSquare) continue;  // NaN too
      const int64_t at = from_row + i + r;
      block->first[i + r] = -1;
      settle_alone(rows.row(at), &score[at], &index[at]);
    }
  }
}

// Rows in the order of the panels they fall into, and within a panel by where they lie in its box: neighbours share panels and
// candidates, which then stay in cache.
void NearestSearch::sort(int64_t count, Block* block) const {
  const int64_t panels = panels_->plan.panels_count;
  int bits = 0;
  while (bits < 3 && (panels << (3 * (bits + 1))) <= std::min<int64_t>(2 * count, INT32_MAX)) ++bits;
  std::vector<int32_t>& begin_of = block->begin_of;
  begin_of.assign((panels << (3 * bits)) + 1, 0);
  panels_->cells_of(block->queries.get(), block->first.data(), count, bits, block->cell.data());
  for (int64_t i = 0; i < count; ++i) {
    if (block->first[i] >= 0) ++begin_of[block->cell[i] + 1];
  }
  for (size_t p = 1; p < begin_of.size(); ++p) begin_of[p] += begin_of[p - 1];
  block->order.resize(begin_of.back());
  for (int64_t i = 0; i < count; ++i)
    if (block->first[i] >= 0) block->order[begin_of[block->cell[i]]++] = (int32_t)i;
}

void NearestSearch::run_panels(const Rows& rows, const int64_t* guess, double* score, int64_t* index) {
  const int64_t n = rows.count, dim = codes_.work().dim;
  const int64_t together = std::min(kMostBlockRows, std::max(kBlockRows, kRowsPerPanel * panels_->plan.panels_count));
  const int64_t per_block = std::max<int64_t>(256, std::min<int64_t>(together, (n + parallel_.threads - 1) / parallel_.threads));
  const int64_t blocks = (n + per_block - 1) / per_block;
  std::vector<PanelCounts> counts(blocks);
  parallel_.share(blocks, [&](auto next) {
    Block block;
    block.queries.reset(new PanelQuery[per_block]);
    if (rows_need_work(codes_)) block.work.reset(new float[per_block * dim]);
    block.first.resize(per_block);
    block.cell.resize(per_block);
    if (guess) block.guess.resize(per_block);
    for (int64_t b = next(); b < blocks; b = next()) {
      const int64_t from = b * per_block, count = std::min(per_block, n - from);
      describe(rows, from, count, &block, score, index);
      sort(count, &block);
      for (int64_t i = 0; guess && i < count; ++i) block.guess[i] = codes_.representative(guess[from + i]);
      const float* given = rows.row(from);
      kernels().panels(panels_->plan, codes_.exact(), given, rows.ld, block.work ? block.work.get() : given,
                       block.work ? dim : rows.ld, block.queries.get(), block.order.data(), block.first.data(),
                       guess ? block.guess.data() : nullptr, (int64_t)block.order.size(), score + from, index + from, &counts[b]);
    }
  });
  counts.push_back(report_.counts);
  report_.counts = sum_of(counts);
  settle_always(rows, score, index);
}

// Codes without a vector in the plans, by the exact formula.
void NearestSearch::settle_always(const Rows& rows, double* score, int64_t* index) const {
  if (codes_.always().empty()) return;
  parallel_(rows.count, 256, [&](int64_t begin, int64_t end) {
    Row row;
    for (int64_t i = begin; i < end; ++i) {
      if (isnan(score[i])) continue;
      start_row(&row, rows.row(i));
      row.best = score[i];
      row.index = index[i];
      for (int32_t code : codes_.always()) {
        row.candidate[row.count] = code;
        row.score[row.count++] = 0;
        if (row.count == kCandidates) kernels().settle(codes_.exact(), &row, 1);
      }
      kernels().settle(codes_.exact(), &row, 1);
      score[i] = row.best;
      index[i] = row.index;
    }
  });
}

void search_rows(const ExactCodes& given, int64_t count, const Rows& rows, const Hints& hints, const Parallel& parallel, Road road,
                 double* score, int64_t* index, SearchReport* report) {
  const Few few = road == Road::kFew ? Few::kYes : road == Road::kAuto ? few_rows(rows.count, count, given.dim) : Few::kNo;
  const int64_t settled = few == Few::kNo ? -1 : search_few(given, count, rows, few, parallel, score, index);
  if (settled >= 0) {
    if (report) {
      report->road = Road::kFew;
      report->searched = count;
      report->counts.candidates = settled;
    }
    return;
  }
  const Codes codes(given, count, parallel);
  NearestSearch search(codes, rows, hints, parallel, road == Road::kFew ? Road::kAuto : road);
  search.run(rows, hints.guess, score, index);
  if (!report) return;
  *report = search.report();
  report->searched = (int64_t)codes.searched().size();
  report->always = (int64_t)codes.always().size();
}

void nearest(const View& x, const View& codebook, Metric metric, const Hints* hints, float* distance, int64_t* indices,
             const Parallel& parallel, Road road, SearchReport* report) {
  const int64_t groups = x.size[1], batches = x.size[0], per_batch = x.size[2];
  if (batches * per_batch == 0) return;
  FloatMode mode;
  std::unique_ptr<double[]> score(new double[batches * per_batch]);
  std::unique_ptr<int64_t[]> index(new int64_t[batches * per_batch]);
  for (int64_t g = 0; g < groups; ++g) {
    const Rows rows = rows_of_group(x, g, parallel);
    const Rows given = rows_of_group(codebook, g, parallel);
    const ExactCodes codes = {given.data, given.ld, given.dim, nullptr, metric};
    search_rows(codes, given.count, rows, hints[g], parallel, road, score.get(), index.get(), report);
    parallel(rows.count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t batch = i / per_batch, last = std::min(end, (batch + 1) * per_batch);
        const int64_t to = (batch * groups + g - batch) * per_batch;  // row i of [B, N] is element to + i of [B, G, N]
        for (; i < last; ++i) {
          distance[to + i] = distance_of(codes, rows.row(i), score[i]);
          indices[to + i] = index[i];
        }
      }
    });
  }
}

}  // namespace vqfast
