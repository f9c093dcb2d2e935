#include "quantize.h"

#include <math.h>

#include <algorithm>

#include "element.h"
#include "ema.h"

namespace vqfast {
namespace {

constexpr int64_t kErrorBlock = 1024;  // rows per partial sum of the error; part of the result's definition

double squared_error(const float* x, const float* c, int64_t dim) {
  double total = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double t = (double)x[d] - (double)c[d];
    total += t * t;
  }
  return total;
}

// A score may be a sum in another order, which float32 does not tell from the formula's: so that blocks of rows and threads do not show
// in a total, it is float32 that is added wherever the score has one.
double settled_error(double score) {
  const float rounded = (float)score;
  return isfinite(rounded) ? rounded : score;
}

// What follows the search of one group: for every row in turn write(row, masked, its code's values; null: masked or not finite), where
// begin_block() makes the `write` of a block of rows. Returns the error summed over blocks in order, and keeps in `kept` the code of rows
// that count (-1 otherwise).
template <class Begin>
double finish_rows(const ExactCodes& codes, const Rows& rows, const bool* mask, const double* score, const int64_t* index,
                   int64_t* kept, int64_t* nonfinite, const Parallel& parallel, Begin&& begin_block) {
  const int64_t blocks = (rows.count + kErrorBlock - 1) / kErrorBlock;
  std::vector<double> error(blocks, 0.0);
  std::vector<int64_t> bad(blocks, 0);
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      auto write = begin_block();
      for (int64_t i = b * kErrorBlock; i < std::min(rows.count, (b + 1) * kErrorBlock); ++i) {
        const bool masked = mask && !mask[i];
        const bool valid = !masked && !isnan(score[i]);
        const float* code = codes.codes + index[i] * codes.ld;
        kept[i] = valid ? index[i] : -1;
        bad[b] += !masked && !valid;
        if (valid) error[b] += codes.metric == kL2 ? settled_error(score[i]) : squared_error(rows.row(i), code, rows.dim);
        write(i, masked, valid ? code : nullptr);
      }
    }
  });
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    total += error[b];
    *nonfinite += bad[b];
  }
  return total;
}

}  // namespace

void quantize(const View& x, const View& codebook, const bool* mask, Metric metric, const Hints* hints, const StepOutputs& out,
              const Parallel& parallel) {
  FloatMode mode;
  const int64_t groups = x.size[1], per_batch = x.size[2], count = x.size[0] * per_batch, dim = x.size[3];
  const int64_t k = codebook.size[2];
  std::vector<double> score(count);
  std::vector<int64_t> index(count), kept(count);
  const std::vector<float> zeros(dim, 0.0f), nans(dim, NAN);
  double error = 0;
  *out.nonfinite = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const Rows rows = rows_of_group(x, g, parallel);
    const Rows given = rows_of_group(codebook, g, parallel);
    const ExactCodes codes = {given.data, given.ld, given.dim, nullptr, metric};
    search_rows(codes, given.count, rows, hints[g], parallel, Road::kAuto, score.data(), index.data(), nullptr);
    error += finish_rows(codes, rows, mask, score.data(), index.data(), kept.data(), out.nonfinite, parallel,
                         [&] {
                           return [&, writer = RowWriter(out.quantized, g)](int64_t i, bool masked, const float* code) mutable {
                             const int64_t at = (i / per_batch * groups + g) * per_batch + i % per_batch;  // [B, G, N]
                             out.indices[at] = masked ? -1 : index[i];
                             writer.add(i, masked ? zeros.data() : code ? code : nans.data());
                           };
                         });
    code_stats(rows, kept.data(), k, out.sums ? out.sums + g * k * dim : nullptr, out.counts + g * k, parallel);
  }
  out.sq_error[0] = out.sq_error[1] = error;
}

namespace {

template <Type type>
const float* widened(const View& v, int64_t at, float* to) {
  const auto* from = static_cast<const typename Element<type>::T*>(v.data) + at;
  if (type == Type::kFloat32 && v.stride[3] == 1) return reinterpret_cast<const float*>(from);
  for (int64_t d = 0; d < v.size[3]; ++d) to[d] = Element<type>::widen(from[d * v.stride[3]]);
  return to;
}

// Code k of level q and group g of codebooks [Q, G, K, D]: where it lies, or in `to`.
const float* code_of(const View& codebooks, int64_t q, int64_t g, int64_t k, float* to) {
  const int64_t at = q * codebooks.stride[0] + g * codebooks.stride[1] + k * codebooks.stride[2];
  switch (codebooks.type) {
    case Type::kFloat32: return widened<Type::kFloat32>(codebooks, at, to);
    case Type::kFloat16: return widened<Type::kFloat16>(codebooks, at, to);
    case Type::kBFloat16: return widened<Type::kBFloat16>(codebooks, at, to);
  }
  return to;
}

// The sum of each row's codes, and what all levels together left over of it (pull, or null), of group g after the search. taken: how many codes
// a row has; fewer than there are levels where it is masked or stopped being finite.
void add_up(const Rows& rows, const View& codebooks, const bool* mask, const std::vector<int32_t>& taken, const StepOutputs& out, int64_t g,
            int64_t per_batch, float* pull, const Parallel& parallel) {
  const int64_t dim = rows.dim, count = rows.count, levels = codebooks.size[0], groups = codebooks.size[1];
  parallel(count, 512, [&](int64_t begin, int64_t end) {
    const int64_t slots = std::min(kRowsTogether + 1, end - begin);  // kRowsTogether wait in the writer while one more is made
    std::vector<float> sums(slots * dim), left(dim), wide(dim);
    RowWriter writer(out.quantized, g);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = (i / per_batch * groups + g) * per_batch + i % per_batch;  // [B, G, N]
      const bool complete = taken[i] == levels;
      float *sum = &sums[i % slots * dim], *pulled = pull ? pull + at * dim : nullptr;
      if (pulled) std::fill(pulled, pulled + dim, 0.0f);
      if (!complete) std::fill(sum, sum + dim, mask && !mask[i] ? 0.0f : NAN);
      if (pulled) std::copy_n(rows.row(i), dim, left.data());
      for (int64_t q = 0; q < taken[i]; ++q) {
        const float* code = code_of(codebooks, q, g, out.indices[q * count * groups + at], wide.data());
        for (int64_t d = 0; complete && d < dim; ++d) sum[d] = q == 0 ? code[d] : sum[d] + code[d];
        for (int64_t d = 0; pulled && d < dim; ++d) {
          left[d] -= code[d];
          pulled[d] = q == 0 ? left[d] : pulled[d] + left[d];
        }
      }
      for (int64_t d = 0; pulled && !complete && d < dim; ++d) pulled[d] += 0.0f;  // of the levels it did not take: -0 becomes +0
      writer.add(i, sum);
    }
  });
}

}  // namespace

void residual(const View& x, const View& codebooks, const bool* mask, Metric metric, const StepOutputs& out, float* pull,
              const Parallel& parallel) {
  FloatMode mode;
  const int64_t levels = codebooks.size[0], groups = x.size[1], per_batch = x.size[2], count = x.size[0] * per_batch;
  const int64_t k = codebooks.size[2], dim = x.size[3];
  std::vector<double> score(count);
  std::vector<int64_t> index(count), kept(count);
  std::unique_ptr<float[]> rest(new float[std::max<int64_t>(1, levels > 1 ? count * dim : 0)]);
  const int64_t type_bytes = codebooks.type == Type::kFloat32 ? 4 : 2;
  double error = 0;
  *out.nonfinite = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const Rows given = rows_of_group(x, g, parallel);
    std::vector<int32_t> taken(count, 0);
    for (int64_t q = 0; q < levels; ++q) {
      View level = codebooks;
      level.data = static_cast<const char*>(codebooks.data) + q * codebooks.stride[0] * type_bytes;
      level.size[0] = 1;
      Rows rows;
      rows.data = q == 0 ? given.data : rest.get();
      rows.ld = q == 0 ? given.ld : dim;
      rows.count = count;
      rows.dim = dim;
      const Rows codebook = rows_of_group(level, g, parallel);
      const ExactCodes codes = {codebook.data, codebook.ld, codebook.dim, nullptr, metric};
      search_rows(codes, codebook.count, rows, Hints{}, parallel, Road::kAuto, score.data(), index.data(), nullptr);
      int64_t nonfinite = 0;
      int64_t* indices = out.indices + q * count * groups;
      error += finish_rows(codes, rows, mask, score.data(), index.data(), kept.data(), &nonfinite, parallel, [&] {
        return [&](int64_t i, bool masked, const float* code) {
          indices[(i / per_batch * groups + g) * per_batch + i % per_batch] = masked ? -1 : index[i];
          taken[i] += code != nullptr;
        };
      });
      code_stats(rows, kept.data(), k, out.sums ? out.sums + (q * groups + g) * k * dim : nullptr,
                 out.counts + (q * groups + g) * k, parallel);
      if (q == 0) *out.nonfinite += nonfinite;
      if (q + 1 == levels) break;
      // The rest is rewritten in place, so this comes after the sums that need it as it was.
      parallel(count, 512, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          float* left = rest.get() + i * dim;
          if (kept[i] >= 0) {
            const float *row = rows.row(i), *code = codebook.row(index[i]);
            for (int64_t d = 0; d < dim; ++d) left[d] = row[d] - code[d];
          } else {
            std::fill(left, left + dim, mask && !mask[i] ? 0.0f : NAN);
          }
        }
      });
    }
    add_up(given, codebooks, mask, taken, out, g, per_batch, pull, parallel);
  }
  out.sq_error[0] = out.sq_error[1] = error;
}

}  // namespace vqfast
