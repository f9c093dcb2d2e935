// Values of the supported dtypes as floats and back. Torch-free.
#pragma once
#include <string.h>

#include "view.h"

namespace vqfast {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// None of these branches, so that the compiler makes vectors of a loop over them. Values are exact, or rounded to the nearest even.
template <Type type>
struct Element;
template <>
struct Element<Type::kFloat32> {
  using T = float;
  static float widen(float v) { return v; }
  static float narrow(float v) { return v; }
};
template <>
struct Element<Type::kFloat16> {
  using T = uint16_t;
  static float widen(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t scaled = bits_as<uint32_t>(bits_as<float>((uint32_t)(h & 0x7FFF) << 13) * 0x1p112f);  // subnormals too
    return bits_as<float>(sign | scaled | ((h & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u));
  }
  static uint16_t narrow(float v) {
    const uint32_t bits = bits_as<uint32_t>(v), size = bits & 0x7FFFFFFF;
    // Subnormals are multiples of 2^-24, the last place of 0.5, by which the addition rounds them.
    const uint32_t small = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3F000000;
    const uint32_t normal = (size + 0xFFF + ((size >> 13) & 1) - (112u << 23)) >> 13;
    const uint32_t finite = size < 0x38800000 ? small : size < 0x477FF000 ? normal : 0x7C00;  // from 65520 on infinite
    return (uint16_t)(((bits >> 16) & 0x8000) | (size > 0x7F800000 ? 0x7E00 : finite));
  }
};
template <>
struct Element<Type::kBFloat16> {
  using T = uint16_t;
  static float widen(uint16_t h) { return bits_as<float>((uint32_t)h << 16); }
  static uint16_t narrow(float v) {
    const uint32_t bits = bits_as<uint32_t>(v);
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
};

// The next rows of a coordinate on their way: no hardware sees a pattern in as many streams as there are coordinates.
template <int kForWriting, class T>
void fetch_next(const T* at) {
  for (int64_t i = 0; i < kRowsTogether; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(at + kRowsTogether + i, kForWriting);
}

}  // namespace vqfast
