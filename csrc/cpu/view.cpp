#include "view.h"

#include <string.h>

#include <algorithm>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace vqfast {
namespace {

float widen_half(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  uint32_t exponent = (h >> 10) & 0x1F, mantissa = h & 0x3FF, bits;
  if (exponent == 0x1F) {
    bits = sign | 0x7F800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float value = (float)mantissa * 0x1p-24f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

template <Type type>
struct Element;
template <>
struct Element<Type::kFloat32> {
  using T = float;
  static float widen(float v) { return v; }
};
template <>
struct Element<Type::kFloat16> {
  using T = uint16_t;
  static float widen(uint16_t v) { return widen_half(v); }
};
template <>
struct Element<Type::kBFloat16> {
  using T = uint16_t;
  static float widen(uint16_t v) {
    const uint32_t bits = (uint32_t)v << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
  }
};

// Rows that lie far apart per coordinate (channels-first) are read along their own axis, a block at a time.
template <Type type>
void widen_rows(const View& v, int64_t b, int64_t g, int64_t begin, int64_t end, float* out, int64_t dim) {
  using T = typename Element<type>::T;
  const T* from = static_cast<const T*>(v.data) + b * v.stride[0] + g * v.stride[1];
  constexpr int64_t kBlock = 64;
  for (int64_t n0 = begin; n0 < end; n0 += kBlock) {
    const int64_t n1 = std::min(end, n0 + kBlock);
    if (v.stride[3] == 1) {
      for (int64_t n = n0; n < n1; ++n)
        for (int64_t d = 0; d < dim; ++d) out[n * dim + d] = Element<type>::widen(from[n * v.stride[2] + d]);
    } else {
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t n = n0; n < n1; ++n) out[n * dim + d] = Element<type>::widen(from[n * v.stride[2] + d * v.stride[3]]);
    }
  }
}

}  // namespace

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

#if defined(__x86_64__)
FloatMode::FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
FloatMode::~FloatMode() { _mm_setcsr(saved_); }
#else
FloatMode::FloatMode() : saved_(0) {}
FloatMode::~FloatMode() {}
#endif

}  // namespace vqfast
