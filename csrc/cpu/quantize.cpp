#include "quantize.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "ema.h"

namespace vqfast {
namespace {

constexpr int64_t kErrorBlock = 1024;  // rows per partial sum of the error; part of the result's definition

uint16_t narrow_bfloat16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (v != v) return 0x7FC0;
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

uint16_t narrow_half(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  if (v != v) return 0x7E00;
  const float size = fabsf(v);
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) return sign | (uint16_t)lrintf(size * 0x1p24f);  // subnormal: a multiple of 2^-24
  memcpy(&bits, &size, 4);
  bits += 0xFFF + ((bits >> 13) & 1);
  return sign | (uint16_t)((bits >> 13) - (112 << 10));
}

int64_t bytes_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

void write_row(void* out, int64_t at, Type type, const float* values, int64_t dim) {
  char* to = static_cast<char*>(out) + at * dim * bytes_of(type);
  if (type == Type::kFloat32) {
    memcpy(to, values, dim * 4);
    return;
  }
  uint16_t* half = reinterpret_cast<uint16_t*>(to);
  for (int64_t d = 0; d < dim; ++d) half[d] = type == Type::kFloat16 ? narrow_half(values[d]) : narrow_bfloat16(values[d]);
}

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

// What follows the search of one group: called for every row in turn with its code's values (null: masked or not finite).
// Returns the error summed over blocks in order, and keeps in `kept` the code of rows that count (-1 otherwise).
template <class Write>
double finish_rows(const ExactCodes& codes, const Rows& rows, const bool* mask, const double* score, const int64_t* index,
                   int64_t* kept, int64_t* nonfinite, const Parallel& parallel, Write&& write) {
  const int64_t blocks = (rows.count + kErrorBlock - 1) / kErrorBlock;
  std::vector<double> error(blocks, 0.0);
  std::vector<int64_t> bad(blocks, 0);
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
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
                         [&](int64_t i, bool masked, const float* code) {
                           const int64_t at = (i / per_batch * groups + g) * per_batch + i % per_batch;  // [B, G, N]
                           out.indices[at] = masked ? -1 : index[i];
                           write_row(out.quantized, at, x.type, masked ? zeros.data() : code ? code : nans.data(), dim);
                         });
    code_stats(rows, kept.data(), k, out.sums ? out.sums + g * k * dim : nullptr, out.counts + g * k, parallel);
  }
  out.sq_error[0] = out.sq_error[1] = error;
}

void residual(const View& x, const View& codebooks, const bool* mask, Metric metric, const StepOutputs& out, float* pull,
              const Parallel& parallel) {
  FloatMode mode;
  const int64_t levels = codebooks.size[0], groups = x.size[1], per_batch = x.size[2], count = x.size[0] * per_batch;
  const int64_t k = codebooks.size[2], dim = x.size[3];
  std::vector<double> score(count);
  std::vector<int64_t> index(count), kept(count);
  std::unique_ptr<float[]> rest(new float[std::max<int64_t>(1, count * dim)]), total(new float[std::max<int64_t>(1, count * dim)]);
  const int64_t type_bytes = bytes_of(codebooks.type);
  double error = 0;
  *out.nonfinite = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const Rows given = rows_of_group(x, g, parallel);
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
      error += finish_rows(codes, rows, mask, score.data(), index.data(), kept.data(), &nonfinite, parallel,
                           [&](int64_t i, bool masked, const float* code) {
                             const int64_t at = (i / per_batch * groups + g) * per_batch + i % per_batch;
                             indices[at] = masked ? -1 : index[i];
                             float* sum = total.get() + i * dim;
                             for (int64_t d = 0; d < dim; ++d) {
                               const float value = masked ? 0.0f : code ? code[d] : NAN;
                               sum[d] = q == 0 ? value : sum[d] + value;
                             }
                           });
      code_stats(rows, kept.data(), k, out.sums ? out.sums + (q * groups + g) * k * dim : nullptr,
                 out.counts + (q * groups + g) * k, parallel);
      // The rest is rewritten in place, so this comes after the sums that need it as it was.
      if (q + 1 < levels || pull) {
        parallel(count, 512, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            float* left = rest.get() + i * dim;
            if (kept[i] >= 0) {
              const float* row = rows.row(i);
              const float* code = codes.codes + index[i] * codes.ld;
              for (int64_t d = 0; d < dim; ++d) left[d] = row[d] - code[d];
            } else {
              std::fill(left, left + dim, mask && !mask[i] ? 0.0f : NAN);
            }
            if (!pull) continue;
            float* sum = pull + ((i / per_batch * groups + g) * per_batch + i % per_batch) * dim;
            for (int64_t d = 0; d < dim; ++d) {
              const float value = kept[i] >= 0 ? left[d] : 0.0f;
              sum[d] = q == 0 ? value : sum[d] + value;
            }
          }
        });
      }
      if (q == 0) *out.nonfinite += nonfinite;
    }
    parallel(count, 512, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        write_row(out.quantized, (i / per_batch * groups + g) * per_batch + i % per_batch, x.type, total.get() + i * dim, dim);
    });
  }
  out.sq_error[0] = out.sq_error[1] = error;
}

}  // namespace vqfast
