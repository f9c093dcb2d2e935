// masked_conv: causal convolution over NCHW pictures that multiplies only unmasked taps, and the gate of the gated networks. Torch-free.
#pragma once
#include <cstdint>

#include "sample.h"

namespace vqfast {

struct MaskedConvShape {
  int64_t batch, in_channels, out_channels, height, width, kernel_height, kernel_width, dilation, maps;
  bool include_center;
};

// Taps in raster order, the centre last; with several maps the centre's masked weights are zeros in the packed panels.
int64_t masked_conv_taps(const MaskedConvShape& s);
// [panel][tap, channel][64]: panels * taps * in_channels * 64 floats. weight is contiguous [out, in, kh, kw].
void masked_conv_pack(const MaskedConvShape& s, const float* weight, float* packed);
// Picture `image` as [height + rows above][columns left + width + columns right][channels] with zero margins.
int64_t masked_conv_padded(const MaskedConvShape& s);
void masked_conv_pad(const MaskedConvShape& s, const float* x, int64_t sb, int64_t sc, int64_t sh, int64_t sw, int64_t image, float* padded);
// Rows [begin, end) of one picture: out is contiguous [out_channels, height, width] of that picture.
void masked_conv_rows(const MaskedConvShape& s, const SampleKernels& k, const float* padded, const float* packed, const float* bias,
                      int64_t begin, int64_t end, float* out);

// One channel pair of one picture: out[i] = gate(a[i] + va, b[i] + vb).
void gate_plane(const SampleKernels& k, bool glu, const float* a, const float* b, float va, float vb, int64_t n, float* out);
// Its gradient: to_a, to_b from grad.
void gate_plane_backward(const SampleKernels& k, bool glu, const float* grad, const float* a, const float* b, float va, float vb,
                         int64_t n, float* to_a, float* to_b);

}  // namespace vqfast
