// Drawing a token from logits. Everything is float64 add, multiply and divide in a fixed order, so the compiler may vectorise across
// codes and the tokens stay the same; the noise is a hash of (seed, image, position, code), so any order of evaluation draws the same.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace vqfast {
namespace {

double from_bits(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

uint64_t to_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

// splitmix64's finaliser
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ULL;

// Natural logarithm of a positive normal number: x = m 2^e with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1)).
inline double log64(double x) {
  uint64_t bits = to_bits(x);
  const uint64_t shifted = bits - 0x3fe6a09e667f3bcdULL;  // sqrt(1/2)
  const int64_t e = static_cast<int64_t>(shifted) >> 52;
  const double m = from_bits(bits - (static_cast<uint64_t>(e) << 52));
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 21;
  p = p * z + 1.0 / 19;
  p = p * z + 1.0 / 17;
  p = p * z + 1.0 / 15;
  p = p * z + 1.0 / 13;
  p = p * z + 1.0 / 11;
  p = p * z + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  const double small = (s * z) * p;
  return static_cast<double>(e) * 0.6931471805599453 + (2.0 * s + 2.0 * small);
}

// exp of x <= 0; below -700 the result is 0.
inline double exp64(double x) {
  const double clipped = x < -700.0 ? -700.0 : x;
  const double shifted = clipped * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52 rounds to the nearest integer
  const double n = shifted - 6755399441055744.0;
  const double r = (clipped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const double y = from_bits(to_bits(p) + (to_bits(shifted) << 52));
  return x < -700.0 ? 0.0 : y;
}

// keep[k] = 0 for codes that top-k or top-p leave out. Order: larger z first, equal z by lower index.
void restrict_codes(const double* z, double* keep, double* weight, int64_t* order, const DrawSettings& s) {
  const int64_t n = s.codebook_size;
  for (int64_t k = 0; k < n; ++k) order[k] = k;
  std::sort(order, order + n, [z](int64_t a, int64_t b) { return z[a] > z[b] || (z[a] == z[b] && a < b); });
  int64_t kept = s.top_k > 0 ? std::min(s.top_k, n) : n;
  if (s.top_p < 1.0) {
    double total = 0, sum = 0;
    for (int64_t r = 0; r < kept; ++r) total += weight[r] = exp64(z[order[r]] - z[order[0]]);
    int64_t r = 0;
    while (r < kept && (r == 0 || sum < s.top_p * total)) sum += weight[r++];
    kept = r;
  }
  std::fill(keep, keep + n, 0.0);
  for (int64_t r = 0; r < kept; ++r) keep[order[r]] = 1.0;
}

}  // namespace

int64_t draw_token(const float* logits, const DrawSettings& s, int64_t image, int64_t position, double* scratch, int64_t* order) {
  const int64_t n = s.codebook_size;
  double *z = scratch, *keep = scratch + n, *weight = scratch + 2 * n, *noise = scratch + 3 * n;
  const bool greedy = s.temperature == 0.0;
  // NaN logits can never be drawn: they become the lowest number.
  constexpr double lowest = std::numeric_limits<double>::lowest();
  for (int64_t k = 0; k < n; ++k) {
    const double value = greedy ? logits[k] : static_cast<double>(logits[k]) / s.temperature;
    z[k] = value >= lowest ? value : lowest;
  }
  const bool restricted = !greedy && ((s.top_k > 0 && s.top_k < n) || s.top_p < 1.0);
  if (restricted) restrict_codes(z, keep, weight, order, s);
  if (!greedy) {
    uint64_t state = mix(static_cast<uint64_t>(s.seed) + kGolden);
    state = mix(state ^ (static_cast<uint64_t>(image) + 2 * kGolden));
    state = mix(state ^ (static_cast<uint64_t>(position) + 3 * kGolden));
    for (int64_t k = 0; k < n; ++k) {
      const uint64_t r = mix(state + static_cast<uint64_t>(k + 1) * kGolden);
      // 52 bits and a half: exact in float64, never 0 and never 1. The integer becomes a double by bits alone: 1.r - 1.
      const double u = (from_bits((r >> 12) | 0x3ff0000000000000ULL) - 1.0) + 0x1p-53;
      noise[k] = -log64(-log64(u));
    }
    for (int64_t k = 0; k < n; ++k) z[k] = z[k] + noise[k];
  }
  int64_t best = -1;
  for (int64_t k = 0; k < n; ++k)
    if ((!restricted || keep[k] != 0.0) && (best < 0 || z[k] > z[best])) best = k;
  return best;
}

double token_log_prob(const float* logits, int64_t n, int64_t token) {
  double top = logits[0];
  for (int64_t k = 1; k < n; ++k) top = logits[k] > top ? static_cast<double>(logits[k]) : top;
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += exp64(static_cast<double>(logits[k]) - top);
  return (static_cast<double>(logits[token]) - top) - log64(sum);
}

}  // namespace vqfast
