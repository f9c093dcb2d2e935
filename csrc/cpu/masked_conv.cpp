// A row of outputs is a small matrix product per tap: [width, channels] (a shifted view of the padded, channels-last picture) times
// [channels, 64 outputs]. Each output is one chain of fused multiply-adds over (tap, channel) ascending, as in the sampler.
#include "masked_conv.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "view.h"

namespace vqfast {
namespace {

struct Margins {
  int64_t up, side;
};

Margins margins(const MaskedConvShape& s) { return {s.dilation * (s.kernel_height / 2), s.dilation * (s.kernel_width / 2)}; }

bool has_center(const MaskedConvShape& s) { return s.include_center || s.maps > 1; }

bool center_sees(const MaskedConvShape& s, int64_t out, int64_t in) {
  const int64_t out_map = out / (s.out_channels / s.maps), in_map = in / (s.in_channels / s.maps);
  return s.include_center ? in_map <= out_map : in_map < out_map;
}

}  // namespace

int64_t masked_conv_taps(const MaskedConvShape& s) {
  return (s.kernel_height / 2) * s.kernel_width + s.kernel_width / 2 + (has_center(s) ? 1 : 0);
}

void masked_conv_pack(const MaskedConvShape& s, const float* weight, float* packed) {
  const int64_t taps = masked_conv_taps(s), kernel = s.kernel_height * s.kernel_width, center = kernel / 2;
  const int64_t panels = (s.out_channels + kWeightPanel - 1) / kWeightPanel;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < s.in_channels; ++c) {
        float* row = packed + ((p * taps + t) * s.in_channels + c) * kWeightPanel;
        for (int64_t o = 0; o < kWeightPanel; ++o) {
          const int64_t out = p * kWeightPanel + o;
          const bool seen = out < s.out_channels && (t != center || center_sees(s, out, c));
          row[o] = seen ? weight[(out * s.in_channels + c) * kernel + t] : 0.0f;
        }
      }
}

int64_t masked_conv_padded(const MaskedConvShape& s) {
  const Margins m = margins(s);
  return (s.height + m.up) * (s.width + 2 * m.side) * s.in_channels;
}

void masked_conv_pad(const MaskedConvShape& s, const float* x, int64_t sb, int64_t sc, int64_t sh, int64_t sw, int64_t image, float* padded) {
  const Margins m = margins(s);
  const int64_t wide = s.width + 2 * m.side;
  std::memset(padded, 0, masked_conv_padded(s) * sizeof(float));
  for (int64_t i = 0; i < s.height; ++i) {
    float* row = padded + ((i + m.up) * wide + m.side) * s.in_channels;
    const float* from = x + image * sb + i * sh;
    for (int64_t c = 0; c < s.in_channels; ++c)
      for (int64_t j = 0; j < s.width; ++j) row[j * s.in_channels + c] = from[c * sc + j * sw];
  }
}

void masked_conv_rows(const MaskedConvShape& s, const SampleKernels& k, const float* padded, const float* packed, const float* bias,
                      int64_t begin, int64_t end, float* out) {
  FloatMode mode;
  const Margins m = margins(s);
  const int64_t wide = s.width + 2 * m.side, taps = masked_conv_taps(s), channels = s.in_channels;
  const int64_t panels = (s.out_channels + kWeightPanel - 1) / kWeightPanel;
  std::vector<float> acc(kRowChunk * kWeightPanel);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t count = std::min(kWeightPanel, s.out_channels - p * kWeightPanel);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < s.width; j += kRowChunk) {
        const int64_t rows = std::min(kRowChunk, s.width - j);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t o = 0; o < kWeightPanel; ++o) acc[r * kWeightPanel + o] = bias && o < count ? bias[p * kWeightPanel + o] : 0.0f;
        const float* w = packed + p * taps * channels * kWeightPanel;
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t dy = s.dilation * (t / s.kernel_width), dx = s.dilation * (t % s.kernel_width);
          const float* in = padded + ((i + dy) * wide + j + dx) * channels;
          for (int64_t c = 0; c < channels; c += kWeightBlock) {
            const int64_t n = std::min(kWeightBlock, channels - c);
            k.chain(acc.data(), in + c, channels, rows, w, n);
            w += n * kWeightPanel;
          }
        }
        for (int64_t o = 0; o < count; ++o) {
          float* to = out + ((p * kWeightPanel + o) * s.height + i) * s.width + j;
          for (int64_t r = 0; r < rows; ++r) to[r] = acc[r * kWeightPanel + o];
        }
      }
  }
}

// ---- gate ----

namespace {
constexpr int64_t kStrip = 1024;  // values at a time, so that temporaries stay in L1
}

void gate_plane(const SampleKernels& k, bool glu, const float* a, const float* b, float va, float vb, int64_t n, float* out) {
  FloatMode mode;
  float sa[kStrip], sb[kStrip];
  for (int64_t i = 0; i < n; i += kStrip) {
    const int64_t m = std::min(kStrip, n - i);
    for (int64_t j = 0; j < m; ++j) sa[j] = a[i + j] + va;
    for (int64_t j = 0; j < m; ++j) sb[j] = b[i + j] + vb;
    (glu ? k.glu : k.gate)(out + i, sa, sb, m);
  }
}

void gate_plane_backward(const SampleKernels& k, bool glu, const float* grad, const float* a, const float* b, float va, float vb,
                         int64_t n, float* to_a, float* to_b) {
  FloatMode mode;
  float sa[kStrip], sb[kStrip], t[kStrip], s[kStrip], one[kStrip], large[kStrip];
  std::fill(one, one + kStrip, 1.0f);
  std::fill(large, large + kStrip, 60.0f);  // sigmoid(60) is 1, so gate(a, 60) is tanh(a)
  for (int64_t i = 0; i < n; i += kStrip) {
    const int64_t m = std::min(kStrip, n - i);
    for (int64_t j = 0; j < m; ++j) sa[j] = a[i + j] + va;
    for (int64_t j = 0; j < m; ++j) sb[j] = b[i + j] + vb;
    k.glu(s, one, sb, m);  // sigmoid
    if (glu) std::copy(sa, sa + m, t);
    else k.gate(t, sa, large, m);
    const float* g = grad + i;
    for (int64_t j = 0; j < m; ++j) {
      const float slope = glu ? s[j] : (1.0f - t[j] * t[j]) * s[j];
      to_a[i + j] = g[j] * slope;
      to_b[i + j] = g[j] * t[j] * (s[j] * (1.0f - s[j]));
    }
  }
}

}  // namespace vqfast
