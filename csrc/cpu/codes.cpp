#include "codes.h"

#include <math.h>
#include <string.h>

#include <algorithm>

namespace vqfast {
namespace {

// Rounding unit of float32.
constexpr double kUnitRoundoff = 0x1p-24;
constexpr int64_t kSample = 256;
constexpr double kUp = 1 + 0x1p-20;  // more than some roundings to float32 take away

// Evenly spaced sample of a list.
template <class T>
std::vector<T> sample_of(const std::vector<T>& all, int64_t most) {
  const int64_t n = (int64_t)all.size();
  if (n <= most) return all;
  std::vector<T> out(most);
  for (int64_t i = 0; i < most; ++i) out[i] = all[i * n / most];
  return out;
}

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  const size_t at = std::min(values.size() - 1, (size_t)(q * values.size()));
  std::nth_element(values.begin(), values.begin() + at, values.end());
  return values[at];
}

float median(float a, float b, float c) { return std::max(std::min(a, b), std::min(std::max(a, b), c)); }

// sum c_d^2 as the contract evaluates it: ascending, each operation rounded once.
double exact_norm(const float* c, int64_t dim) {
  double total = 0;
  for (int64_t d = 0; d < dim; ++d) total += (double)c[d] * (double)c[d];
  return total;
}

}  // namespace

Codes::Codes(const ExactCodes& given, int64_t count, const Parallel& parallel) : exact_(given) {
  given_.data = given.codes;
  given_.ld = given.ld;
  given_.count = count;
  given_.dim = given.dim;
  find_usable(parallel);
  if (usable_.empty()) return;
  if (unit_vectors()) {
    make_unit(parallel);
  } else {
    work_.data = given_.data;
    work_.ld = given_.ld;
    work_.count = given_.count;
    work_.dim = given_.dim;
    searched_ = usable_;
  }
  find_centre();
  rescale(parallel);
}

// Finite codes; of equal ones only the lowest index, found by a hash table over all values.
void Codes::find_usable(const Parallel& parallel) {
  const int64_t k = given_.count;
  std::vector<uint64_t> hash(k);
  std::unique_ptr<bool[]> finite(new bool[k]);
  parallel(k, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) hash[i] = kernels().inspect(given_.row(i), given_.dim, &finite[i]);
  });
  equal_.assign(k, -1);
  usable_.reserve(k);
  int64_t slots = 64;
  while (slots < 2 * k) slots *= 2;
  std::vector<int32_t> table(slots, -1);
  for (int64_t i = 0; i < k; ++i) {
    if (!finite[i]) continue;
    int64_t at = (int64_t)(hash[i] >> 17) & (slots - 1);
    for (;; at = (at + 1) & (slots - 1)) {
      const int32_t other = table[at];
      if (other < 0) break;
      if (hash[other] == hash[i] && std::equal(given_.row(i), given_.row(i) + given_.dim, given_.row(other))) break;
    }
    if (table[at] < 0) {
      table[at] = (int32_t)i;
      usable_.push_back((int32_t)i);
    }
    equal_[i] = table[at];
  }
}

// Cosine: c / |c|. Dot: [c, sqrt(M^2 - |c|^2)] / M with M the largest norm, so that the order of inner products is the order of
// distances. Rounded to float32; the search widens its bounds by that error.
void Codes::make_unit(const Parallel& parallel) {
  const bool dot = exact_.metric == kDot;
  const int64_t k = given_.count, dim = given_.dim + (dot ? 1 : 0);
  norm_.assign(k, 0.0);
  parallel((int64_t)usable_.size(), 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) norm_[usable_[i]] = exact_norm(given_.row(usable_[i]), given_.dim);
  });
  exact_.norm = norm_.data();
  // A few codes far larger than all others would leave no resolution for the rest: those are tried exactly by every row.
  std::vector<double> norms;
  for (int32_t c : usable_) norms.push_back(norm_[c]);
  const double ordinary = quantile(norms, 0.75) * 0x1p24;
  for (int32_t c : usable_) {
    const bool own_vector = dot ? norm_[c] <= ordinary : norm_[c] > 0;
    (own_vector ? searched_ : always_).push_back(c);
    if (own_vector) largest_norm_ = std::max(largest_norm_, norm_[c]);
  }
  std::vector<char> has_vector(k, 0);
  for (int32_t c : searched_) has_vector[c] = 1;
  for (int32_t& c : equal_)
    if (c >= 0 && !has_vector[c]) c = -1;
  // Equal cosine for all codes without direction: the lowest index stands for them.
  if (!dot && always_.size() > 1) always_.resize(1);
  if (dot && largest_norm_ == 0) {
    always_.assign(1, searched_.empty() ? always_.front() : searched_.front());
    searched_.clear();
  }
  largest_norm_ = sqrt(largest_norm_);
  work_.owned.reset(new float[std::max<int64_t>(1, k * dim)]);
  work_.data = work_.owned.get();
  work_.ld = work_.dim = dim;
  work_.count = k;
  parallel((int64_t)searched_.size(), 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t c = searched_[i];
      const float* from = given_.row(c);
      float* to = work_.owned.get() + c * dim;
      const double length = dot ? largest_norm_ : sqrt(norm_[c]);
      for (int64_t d = 0; d < given_.dim; ++d) to[d] = (float)((double)from[d] / length);
      if (dot) to[dim - 1] = (float)sqrt(std::max(0.0, 1.0 - norm_[c] / (length * length)));
    }
  });
}

void centre_of(const float* const (&rows)[kCentreRows], int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; ++d) {
    float third[3];
    for (int i = 0; i < 3; ++i) third[i] = median(rows[3 * i][d], rows[3 * i + 1][d], rows[3 * i + 2][d]);
    out[d] = median(third[0], third[1], third[2]);
  }
}

// Mean of a sample of ordinary codes; any centre is valid, a good one makes the bounds tight.
void Codes::find_centre() {
  const int64_t dim = work_.dim;
  centre_.assign(dim, 0.0f);
  if (searched_.empty()) return;
  const std::vector<int32_t> sample = sample_of(searched_, kSample);
  // Steps of the golden ratio: no period in the codes goes along with them.
  std::vector<float> third(3 * dim);
  uint32_t at = 0;
  for (int i = 0; i < 3; ++i) {
    const float* few[kCentreRows];
    for (const float*& row : few) row = work_.row(searched_[((uint64_t)(at += 0x9E3779B9u) * searched_.size()) >> 32]);
    centre_of(few, dim, &third[i * dim]);
  }
  for (int64_t d = 0; d < dim; ++d) centre_[d] = median(third[d], third[dim + d], third[2 * dim + d]);
  std::vector<double> square(sample.size());
  for (size_t i = 0; i < sample.size(); ++i) square[i] = kernels().centred_norm(work_.row(sample[i]), centre_.data(), dim);
  const double ordinary = 16 * quantile(square, 0.75);
  std::vector<double> mean(dim, 0.0);
  int64_t count = 0;
  for (size_t i = 0; i < sample.size(); ++i) {
    if (square[i] > ordinary) continue;
    ++count;
    kernels().accumulate(mean.data(), work_.row(sample[i]), dim);
  }
  for (int64_t d = 0; d < dim; ++d) centre_[d] = (float)(mean[d] / std::max<int64_t>(1, count));
  for (size_t i = 0; i < sample.size(); ++i) square[i] = kernels().centred_norm(work_.row(sample[i]), centre_.data(), dim);
  typical_square_ = quantile(square, 0.75);
}

// Squares of very large or very small values would leave float32: bring the typical code to about norm 1 by a power of two.
// What stays out of reach is dropped from the plans (kFarSquare), and far rows are searched by the exact formula (kWildSquare).
void Codes::rescale(const Parallel& parallel) {
  if (unit_vectors()) return;  // of size 1 already, and their rounding allowance is in that unit
  if (typical_square_ == 0 || (typical_square_ > 0x1p-30 && typical_square_ < 0x1p30)) return;
  int exponent;
  frexp(sqrt(typical_square_), &exponent);
  exponent = std::max(-126, std::min(127, exponent));
  scale_ = ldexpf(1.0f, -exponent);
  std::unique_ptr<float[]> scaled(new float[work_.count * work_.dim]);
  parallel(work_.count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t d = 0; d < work_.dim; ++d) scaled[i * work_.dim + d] = work_.row(i)[d] * scale_;
  });
  work_.owned = std::move(scaled);
  work_.data = work_.owned.get();
  work_.ld = work_.dim;
  for (float& c : centre_) c *= scale_;
  typical_square_ *= (double)scale_ * scale_;
}

// ---- dense -------------------------------------------------------------------------------------------------------------------

DenseBuild::DenseBuild(const Codes& codes, double row_square, const Parallel& parallel) {
  const std::vector<int32_t>& searched = codes.searched();
  const int64_t k = (int64_t)searched.size(), dim = codes.work().dim, panels = (k + kPanel - 1) / kPanel;
  // |computed - true| <= error * (|c|^2 / 2 + |x| |c|): dim fused steps from the rounded start, inputs rounded once when centred.
  const double roundings = (kernels().ops_per_term * (dim + 4) + 8) * kUnitRoundoff;
  error = roundings < 0.5 ? roundings / (1 - roundings) * 1.01 : 1e30;
  // |x| |c| <= (balance |x|^2 + |c|^2 / balance) / 2 splits the bound between row and code; best where balance = |c| / |x|.
  const double ratio = row_square > 0 && codes.typical_square() > 0 ? sqrt(codes.typical_square() / row_square) : 1.0;
  balance = std::min(0x1p30, std::max(0x1p-30, ratio));
  const double of_code = error * (0.5 + 0.5 / balance);
  storage = aligned_floats(panels * kPanel * (dim + 2));
  float* values = storage.get();
  float* start = values + panels * kPanel * dim;
  float* slack = start + panels * kPanel;
  id.assign(panels * kPanel, 0);
  const float* centre = codes.centre().data();
  parallel(panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float* panel = values + p * dim * kPanel;
      for (int lane = 0; lane < kPanel; ++lane) {
        const int64_t at = p * kPanel + lane;
        if (at >= k) {
          for (int64_t d = 0; d < dim; ++d) panel[d * kPanel + lane] = 0.0f;
          start[at] = INFINITY;
          slack[at] = 0.0f;
          continue;
        }
        const float* row = codes.work().row(searched[at]);
        double square = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const float v = (float)((double)row[d] - (double)centre[d]);
          panel[d * kPanel + lane] = v;
          square += (double)v * v;
        }
        id[at] = searched[at];
        if (!(square < kFarSquare)) {
          for (int64_t d = 0; d < dim; ++d) panel[d * kPanel + lane] = 0.0f;
          start[at] = INFINITY;
          slack[at] = 0.0f;
          continue;
        }
        start[at] = nextafterf((float)(square * (0.5 - of_code)), -INFINITY);
        slack[at] = nextafterf((float)(2 * of_code * square), INFINITY);
      }
    }
  });
  plan = {values, start, slack, id.data(), panels, dim};
}

ByteBuild::ByteBuild(const Codes& codes, const Parallel& parallel) {
  const std::vector<int32_t>& searched = codes.searched();
  const int64_t k = (int64_t)searched.size(), dim = codes.work().dim, panels = (k + kPanel - 1) / kPanel, quads = (dim + 3) / 4;
  const float* centre = codes.centre().data();
  storage_ = aligned_ints(panels * kPanel * quads);
  floats_ = aligned_floats(panels * kPanel * 4);
  float *start = floats_.get(), *unit = start + panels * kPanel, *length = unit + panels * kPanel, *error = length + panels * kPanel;
  std::fill(floats_.get(), floats_.get() + panels * kPanel * 4, 0.0f);
  id_.assign(panels * kPanel, 0);
  std::vector<double> most(panels, 0.0);
  parallel(panels, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> v(dim);
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* panel = reinterpret_cast<uint8_t*>(storage_.get() + p * quads * kPanel);
      std::fill(panel, panel + 4 * quads * kPanel, (uint8_t)128);
      for (int64_t at = p * kPanel; at < (p + 1) * kPanel; ++at) {
        start[at] = INFINITY;
        if (at >= k) continue;
        const float* row = codes.work().row(searched[at]);
        float size = 0;
        double square = 0;
        for (int64_t d = 0; d < dim; ++d) {
          v[d] = (float)((double)row[d] - (double)centre[d]);
          size = std::max(size, fabsf(v[d]));
          square += (double)v[d] * v[d];
        }
        id_[at] = searched[at];
        if (!(square < kFarSquare)) continue;
        const float step = size > 1e-30f ? size / 127.0f : 0.0f, per_step = step > 0 ? 127.0f / size : 0.0f;
        double off = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const int steps = (int)(v[d] * per_step + 128.5f) - 128;  // |v| <= size, so within -127..127
          const double left = (double)v[d] - (double)steps * step;
          off += left * left;
          panel[(d / 4 * kPanel + at % kPanel) * 4 + d % 4] = (uint8_t)(128 + steps);
        }
        most[p] = std::max(most[p], square);
        start[at] = (float)(0.5 * square);
        unit[at] = step;
        length[at] = (float)(sqrt(square) * kUp);
        error[at] = (float)((sqrt(off) + 2 * kUnitRoundoff * sqrt(square)) * kUp);
      }
    }
  });
  largest = sqrt(*std::max_element(most.begin(), most.end()));
  // What float32 rounds grows with the largest code and is allowed to every row.
  worth_it = k > 1 && largest * largest < 0x1p12 * codes.typical_square();
  plan = {storage_.get(), start, unit, length, error, id_.data(), panels, quads};
}

// x.c = (x^ + e).(c^ + f) = x^.c^ + e.c + x^.f, where x^ and c^ are the steps: the score of a code misses |e| |c| + |x^| |f| at most, which
// the kernel allows pair by pair, and what is rounded in float32, which is allowed to the row. Returns that.
double in_steps(const ByteBuild& build, ByteRow* row) {
  constexpr double kLost = 1e-16;  // squares that vanish in float32, at most 2,048 of them
  const double length = sqrt((double)row->length * 1.01) + kLost;
  const double error = sqrt((double)row->error * 1.01) + kLost + 2 * kUnitRoundoff * length;
  row->error = (float)(error * kUp);
  row->length = (float)((length + error) * kUp);
  return 8 * kUnitRoundoff * build.largest * (build.largest + length + error);
}

}  // namespace vqfast
