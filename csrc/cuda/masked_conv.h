// masked_conv and gate on CUDA: what the launchers take. Torch-free.
#pragma once

#include "cuda/common.cuh"

namespace vq {

struct Images {  // [B, C, H, W]; strides in elements, any sign
  const void* data;
  int dtype;
  i64 batch, channels, height, width;
  i64 stride_b, stride_c, stride_h, stride_w;

  __host__ __device__ i64 positions() const { return batch * height * width; }  // fewer than 2^31
  __host__ __device__ i64 numel() const { return positions() * channels; }
};

// Which taps of a kernel are multiplied: the first `taps()` in raster order. With several maps the centre is one of them, and
// `sees` says which of its channels.
struct ConvMask {
  i64 out_channels, in_channels, kernel_height, kernel_width, dilation, maps;
  bool include_center;

  __host__ __device__ i64 center() const { return kernel_height / 2 * kernel_width + kernel_width / 2; }
  __host__ __device__ i64 taps() const { return center() + (include_center || maps > 1 ? 1 : 0); }
  __host__ __device__ bool sees(i64 out, i64 in, i64 tap) const {
    if (tap != center()) return tap < center();
    const i64 out_map = out / (out_channels / maps), in_map = in / (in_channels / maps);
    return include_center ? in_map <= out_map : in_map < out_map;
  }
};

struct Kernel {  // [out channels, in channels, kernel height, kernel width]
  const void* data;
  int dtype;
  i64 stride_out, stride_in, stride_h, stride_w;
};

struct MaskedConvProblem {
  Images x;
  Kernel weight;
  ConvMask mask;
  const void* bias;  // [out channels] contiguous, x's dtype, or nullptr
  void* out;         // [B, out channels, H, W] contiguous, x's dtype
};

struct MaskedConvBackward {
  Images grad, x;
  Kernel weight;
  ConvMask mask;
  void* to_x;       // [B, in channels, H, W] contiguous, x's dtype, or nullptr: not wanted
  void* to_weight;  // [out, in, kh, kw] contiguous, weight's dtype, or nullptr
};

size_t masked_conv_space(const MaskedConvProblem& problem);
void masked_conv(const MaskedConvProblem& problem, void* memory, cudaStream_t stream);
size_t masked_conv_backward_space(const MaskedConvBackward& problem);
void masked_conv_backward(const MaskedConvBackward& problem, void* memory, cudaStream_t stream);

enum GateKind : int { kGateTanh = 0, kGateGlu = 1 };

struct GateProblem {
  Images x;            // [B, 2 C, H, W]
  const void* vector;  // [B, 2 C], x's dtype, or nullptr
  i64 vector_stride_b, vector_stride_c;
  int kind;
};

void gate(const GateProblem& problem, void* out, cudaStream_t stream);                              // [B, C, H, W] contiguous
void gate_backward(const GateProblem& problem, const Images& grad, void* out, cudaStream_t stream);  // [B, 2 C, H, W] contiguous

}  // namespace vq
