#include "view.h"

#include <string.h>

#include <algorithm>

#include "element.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace vqfast {
namespace {

// Four values of each of four vectors, turned around: value j of vector i goes to to[j * ld + i].
void turn_around(const float* const (&from)[4], float* to, int64_t ld) {
#if defined(__SSE2__)
  __m128 a = _mm_loadu_ps(from[0]), b = _mm_loadu_ps(from[1]), c = _mm_loadu_ps(from[2]), d = _mm_loadu_ps(from[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + ld, b);
  _mm_storeu_ps(to + 2 * ld, c);
  _mm_storeu_ps(to + 3 * ld, d);
#else
  for (int64_t j = 0; j < 4; ++j)
    for (int64_t i = 0; i < 4; ++i) to[j * ld + i] = from[i][j];
#endif
}

template <Type type>
void widen_rows(const View& v, int64_t b, int64_t g, int64_t begin, int64_t end, float* out, int64_t dim) {
  using T = typename Element<type>::T;
  const T* from = static_cast<const T*>(v.data) + b * v.stride[0] + g * v.stride[1];
  if (v.stride[3] == 1) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t d = 0; d < dim; ++d) out[n * dim + d] = Element<type>::widen(from[n * v.stride[2] + d]);
    return;
  }
  if (v.stride[3] < v.stride[2]) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t d = 0; d < dim; ++d) out[n * dim + d] = Element<type>::widen(from[n * v.stride[2] + d * v.stride[3]]);
    return;
  }
  // Rows that lie far apart per coordinate (channels-first) are read along their own axis.
  float tile[4][kRowsTogether];
  for (int64_t n0 = begin; n0 < end; n0 += kRowsTogether) {
    const int64_t n = std::min(kRowsTogether, end - n0);
    float* to = out + n0 * dim;
    for (int64_t d = 0; d < dim; d += 4) {
      const int64_t some = std::min<int64_t>(4, dim - d);
      for (int64_t j = 0; j < some; ++j) {
        const T* at = from + n0 * v.stride[2] + (d + j) * v.stride[3];
        if (v.stride[2] == 1 && n0 + 2 * kRowsTogether <= end) fetch_next<0>(at);
        if (v.stride[2] == 1) for (int64_t i = 0; i < n; ++i) tile[j][i] = Element<type>::widen(at[i]);
        else for (int64_t i = 0; i < n; ++i) tile[j][i] = Element<type>::widen(at[i * v.stride[2]]);
      }
      int64_t i = 0;
      for (; some == 4 && i + 4 <= n; i += 4)
        turn_around({tile[0] + i, tile[1] + i, tile[2] + i, tile[3] + i}, to + i * dim + d, dim);
      for (; i < n; ++i)
        for (int64_t j = 0; j < some; ++j) to[i * dim + d + j] = tile[j][i];
    }
  }
}

// rows[0..n), n <= kRowsTogether, become the rows from `first` on of what v describes, and `more` follow them.
template <Type type>
void narrow_rows(const Target& v, void* first, const float* const* rows, int64_t n, int64_t more) {
  using T = typename Element<type>::T;
  const int64_t dim = v.size[3];
  T* to = static_cast<T*>(first);
  if (v.stride[3] == 1 || v.stride[2] != 1) {
    for (int64_t i = 0; i < n; ++i, to += v.stride[2]) {
      if (v.stride[3] == 1) for (int64_t d = 0; d < dim; ++d) to[d] = Element<type>::narrow(rows[i][d]);
      else for (int64_t d = 0; d < dim; ++d) to[d * v.stride[3]] = Element<type>::narrow(rows[i][d]);
    }
    return;
  }
  float tile[4][kRowsTogether];
  for (int64_t d = 0; d < dim; d += 4) {
    columns_of(rows, n, d, dim, tile);
    for (int64_t j = 0; j < std::min<int64_t>(4, dim - d); ++j) {
      T* at = to + (d + j) * v.stride[3];
      if (more >= kRowsTogether) fetch_next<1>(at);
      for (int64_t i = 0; i < n; ++i) at[i] = Element<type>::narrow(tile[j][i]);
    }
  }
}

}  // namespace

void columns_of(const float* const* rows, int64_t n, int64_t d, int64_t dim, float (*columns)[kRowsTogether]) {
  const int64_t some = std::min<int64_t>(4, dim - d);
  int64_t i = 0;
  for (; some == 4 && i + 4 <= n; i += 4)
    turn_around({rows[i] + d, rows[i + 1] + d, rows[i + 2] + d, rows[i + 3] + d}, columns[0] + i, kRowsTogether);
  for (; i < n; ++i)
    for (int64_t j = 0; j < some; ++j) columns[j][i] = rows[i][d + j];
}

Rows rows_of_group(const View& v, int64_t group, const Parallel& parallel) {
  Rows rows;
  const int64_t batches = v.size[0], per_batch = v.size[2];
  rows.dim = v.size[3];
  rows.count = batches * per_batch;
  const bool one_run = batches == 1 || v.stride[0] == per_batch * v.stride[2];
  const bool unit = v.stride[3] == 1 || rows.dim == 1;
  const bool aligned = (reinterpret_cast<uintptr_t>(v.data) & 3) == 0;
  if (v.type == Type::kFloat32 && one_run && unit && aligned) {
    rows.data = static_cast<const float*>(v.data) + group * v.stride[1];
    rows.ld = v.stride[2];
    return rows;
  }
  rows.owned.reset(new float[std::max<int64_t>(1, rows.count * rows.dim)]);
  float* out = rows.owned.get();
  for (int64_t b = 0; b < batches; ++b) {
    float* to = out + b * per_batch * rows.dim;
    parallel(per_batch, 512, [&](int64_t begin, int64_t end) {
      switch (v.type) {
        case Type::kFloat32: return widen_rows<Type::kFloat32>(v, b, group, begin, end, to, rows.dim);
        case Type::kFloat16: return widen_rows<Type::kFloat16>(v, b, group, begin, end, to, rows.dim);
        case Type::kBFloat16: return widen_rows<Type::kBFloat16>(v, b, group, begin, end, to, rows.dim);
      }
    });
  }
  rows.data = out;
  rows.ld = rows.dim;
  return rows;
}

void RowWriter::flush() {
  if (count_ == 0) return;
  const int64_t b = first_ / to_.size[2], n = first_ % to_.size[2];
  const int64_t at = b * to_.stride[0] + group_ * to_.stride[1] + n * to_.stride[2];
  const int64_t more = to_.size[2] - n - count_;
  char* first = static_cast<char*>(to_.data) + at * (to_.type == Type::kFloat32 ? 4 : 2);
  switch (to_.type) {
    case Type::kFloat32: narrow_rows<Type::kFloat32>(to_, first, waiting_, count_, more); break;
    case Type::kFloat16: narrow_rows<Type::kFloat16>(to_, first, waiting_, count_, more); break;
    case Type::kBFloat16: narrow_rows<Type::kBFloat16>(to_, first, waiting_, count_, more); break;
  }
  count_ = 0;
}

#if defined(__x86_64__)
FloatMode::FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
FloatMode::~FloatMode() { _mm_setcsr(saved_); }
#else
FloatMode::FloatMode() : saved_(0) {}
FloatMode::~FloatMode() {}
#endif

}  // namespace vqfast
