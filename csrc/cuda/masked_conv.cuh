// masked_conv: a causal convolution as a matrix product over (tap, channel), of the unmasked taps only, and its gradients; and
// the gate that follows it. float32 sums of fused multiply-adds in one fixed order, no atomics: the same bits every time.
//
//     out[p, o]        = bias[o] + sum over taps t, channels c:  x[p + t, c] w[t, c, o]       a block owns 128 positions x 128 o
//     to_x[p, c]       =           sum over taps t, outputs o:   grad[p - t, o] w[t, c, o]    the same kernel, taps mirrored
//     to_w[t, o, c]    =           sum over positions p:         grad[p, o] x[p + t, c]       a block owns one tap, 128 o x 128 c
//                                                                                             and one range of positions
#pragma once

#include "cuda/masked_conv.h"

namespace vq {

constexpr int kConvTile = 128, kConvDepth = 8;  // positions and channels of a block; terms per step of its ring
constexpr int kConvThreads = 256, kConvPatch = 8;  // a thread owns 8 x 8 sums: 64 FMAs for 4 shared-memory reads of 16 bytes
constexpr int kConvItems = kConvTile * kConvDepth / kConvThreads;  // values of each side that a thread brings per step

// Thread (ty, tx) of 16 x 16 owns 4 t .. 4 t + 3 and 64 + 4 t .. 64 + 4 t + 3 of each side: 16-byte reads without conflicts.
__device__ __forceinline__ int conv_patch(int t, int i) { return 4 * t + i % 4 + 64 * (i / 4); }

// A step of the product: sum[i][j] += a[d][i] b[d][j], d ascending.
template <int kPitch>
__device__ __forceinline__ void conv_multiply(float (&sum)[kConvPatch][kConvPatch], const float (&a)[kConvDepth][kPitch],
                                              const float (&b)[kConvDepth][kPitch]) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll 2  // more would spill: two blocks of 256 threads share 65,536 registers
  for (int d = 0; d < kConvDepth; ++d) {
    float left[kConvPatch], right[kConvPatch];
#pragma unroll
    for (int i = 0; i < kConvPatch; ++i) left[i] = a[d][conv_patch(ty, i)], right[i] = b[d][conv_patch(tx, i)];
#pragma unroll
    for (int i = 0; i < kConvPatch; ++i)
#pragma unroll
      for (int j = 0; j < kConvPatch; ++j) sum[i][j] = fma(left[i], right[j], sum[i][j]);
  }
}

// A position of the batch of pictures; a picture's neighbours are found without another division.
struct Pixel {
  int row, column;
  i64 base;  // of channel 0
  __device__ Pixel(const Images& x, i64 position) {
    const u32 plane = u32(x.height * x.width), at = u32(position) % plane, wide = u32(x.width);
    row = int(at / wide), column = int(at % wide);
    base = i64(u32(position) / plane) * x.stride_b + row * x.stride_h + column * x.stride_w;
  }
};

// Where tap t looks from a pixel: rows and columns away, times `sign` (-1 for the gradient to x).
struct Step {
  i64 down, right;
  __device__ Step(const ConvMask& mask, i64 tap, int sign)
      : down((tap / mask.kernel_width - mask.kernel_height / 2) * mask.dilation * sign),
        right((tap % mask.kernel_width - mask.kernel_width / 2) * mask.dilation * sign) {}
  __device__ bool inside(const Images& x, const Pixel& at) const {
    const i64 row = at.row + down, column = at.column + right;
    return row >= 0 && row < x.height && column >= 0 && column < x.width;
  }
  __device__ i64 offset(const Images& x) const { return down * x.stride_h + right * x.stride_w; }
};

// ---- weights, packed: [tile of 128 outputs][tap][inputs padded to 8][128]; masked and padding entries are zeros ----------------

struct PackedWeights {
  float* data;
  i64 outputs, inputs;  // of the product that reads it: swapped for the gradient to x

  __host__ __device__ i64 padded_inputs() const { return ceil_div(inputs, kConvDepth) * kConvDepth; }
  __host__ __device__ i64 tile_floats(i64 taps) const { return taps * padded_inputs() * kConvTile; }
  __host__ __device__ i64 floats(i64 taps) const { return ceil_div(outputs, kConvTile) * tile_floats(taps); }
};

__global__ void __launch_bounds__(256) conv_pack_kernel(Kernel weight, ConvMask mask, PackedWeights packed, bool swapped) {
  const i64 e = i64(blockIdx.x) * 256 + threadIdx.x, taps = mask.taps(), padded = packed.padded_inputs();
  if (e >= packed.floats(taps)) return;
  const i64 output = e / packed.tile_floats(taps) * kConvTile + e % kConvTile;
  const i64 input = e / kConvTile % padded, tap = e / kConvTile / padded % taps;
  const i64 o = swapped ? input : output, c = swapped ? output : input;
  float value = 0;
  if (output < packed.outputs && input < packed.inputs && mask.sees(o, c, tap))
    value = load_f32(weight.data, weight.dtype, o * weight.stride_out + c * weight.stride_in + tap / mask.kernel_width * weight.stride_h +
                                                    tap % mask.kernel_width * weight.stride_w);
  packed.data[e] = value;
}

// ---- forward, and the gradient to x -------------------------------------------------------------------------------------------

struct ConvTiles {  // the next step is brought while this one is multiplied
  alignas(16) float x[2][kConvDepth][kConvTile];
  alignas(16) float w[2][kConvDepth][kConvTile];
};

// Bytes: 1,024 floats of each side for 128^2 x 8 FMAs: 16 FMAs per byte from L2.
__global__ void __launch_bounds__(kConvThreads, 2) masked_conv_kernel(Images x, ConvMask mask, int sign, PackedWeights packed, const void* bias,
                                                                      void* out) {
  VQ_SHARED(ConvTiles, tiles);
  const i64 positions = x.positions(), first = i64(blockIdx.x) * kConvTile, mine = first + threadIdx.x % kConvTile;
  const bool owns = mine < positions;
  const Pixel pixel(x, owns ? mine : 0);
  const i64 taps = mask.taps(), steps = taps * packed.padded_inputs() / kConvDepth;
  const float* from_w = packed.data + blockIdx.y * packed.tile_floats(taps) + threadIdx.x * kConvItems;

  // A thread brings one position of every other channel, and 4 weights.
  constexpr int kStride = kConvThreads / kConvTile;
  const int own = threadIdx.x / kConvTile;
  i64 tap = 0, channel = own, at = 0;
  bool inside = false;
  auto enter_tap = [&] {
    const Step step(mask, tap, sign);
    inside = owns && step.inside(x, pixel);
    at = pixel.base + step.offset(x) + own * x.stride_c;
  };
  float brought[kConvItems];
  auto bring = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kConvItems; ++i)
      brought[i] = inside && channel + i * kStride < x.channels ? load_f32(x.data, x.dtype, at + i * kStride * x.stride_c) : 0.0f;
    copy_async16(&tiles.w[stage][0][0] + threadIdx.x * kConvItems, from_w, 16);
    copy_commit();
    from_w += kConvDepth * kConvTile, channel += kConvDepth, at += kConvDepth * x.stride_c;
    if (channel - own < x.channels) return;
    channel = own, ++tap;
    enter_tap();
  };
  auto land = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kConvItems; ++i) tiles.x[stage][own + i * kStride][threadIdx.x % kConvTile] = brought[i];
    copy_wait<0>();
    sync_threads();
  };

  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float sum[kConvPatch][kConvPatch];
#pragma unroll
  for (int j = 0; j < kConvPatch; ++j) {
    const i64 o = i64(blockIdx.y) * kConvTile + conv_patch(tx, j);
    const float start = bias && o < packed.outputs ? load_f32(bias, x.dtype, o) : 0.0f;
#pragma unroll
    for (int i = 0; i < kConvPatch; ++i) sum[i][j] = start;
  }
  if (steps) enter_tap(), bring(0), land(0);
  for (i64 s = 0; s < steps; ++s) {
    const int stage = int(s & 1);
    if (s + 1 < steps) bring(stage ^ 1);
    conv_multiply(sum, tiles.x[stage], tiles.w[stage]);
    if (s + 1 < steps) land(stage ^ 1);
  }
#pragma unroll
  for (int i = 0; i < kConvPatch; ++i) {
    const i64 position = first + conv_patch(ty, i), plane = x.height * x.width;
    if (position >= positions) continue;
    const i64 picture = u32(position) / u32(plane), at = position - picture * plane;
#pragma unroll
    for (int j = 0; j < kConvPatch; ++j) {
      const i64 o = i64(blockIdx.y) * kConvTile + conv_patch(tx, j);
      if (o < packed.outputs) store(out, x.dtype, (picture * packed.outputs + o) * plane + at, sum[i][j]);
    }
  }
}

// ---- gradient to the weights --------------------------------------------------------------------------------------------------

constexpr int kConvPitch = kConvTile + 4;  // 8 positions of 4 channels, written at once, fall into 32 banks

struct ConvGradTiles {
  alignas(16) float grad[2][kConvDepth][kConvPitch];
  alignas(16) float x[2][kConvDepth][kConvPitch];
};

// Sums of one range of positions: partial[range][tap][out][in].
struct PartialWeights {
  float* data;
  i64 ranges;
};

// blockIdx: x: tile of inputs, y: tile of outputs, z: (range, tap). Bytes: as the forward kernel.
__global__ void __launch_bounds__(kConvThreads, 2) conv_weight_kernel(Images grad, Images x, ConvMask mask, PartialWeights partial) {
  VQ_SHARED(ConvGradTiles, tiles);
  const i64 taps = mask.taps(), tap = blockIdx.z % taps, range = blockIdx.z / taps, positions = x.positions();
  const i64 begin = positions * range / partial.ranges, end = positions * (range + 1) / partial.ranges;
  const Step step(mask, tap, 1);
  const i64 away = step.offset(x);
  // A thread brings one position of every 32nd channel, of both sides.
  constexpr int kStride = kConvThreads / kConvDepth;
  const int own = threadIdx.x / kConvDepth, within = threadIdx.x % kConvDepth;
  const i64 first_out = i64(blockIdx.y) * kConvTile, first_in = i64(blockIdx.x) * kConvTile;

  float grads[kConvItems], values[kConvItems];
  auto bring = [&](i64 start) {
    const i64 position = start + within;
    const Pixel pixel(x, position < end ? position : begin), to(grad, position < end ? position : begin);
    const bool inside = position < end && step.inside(x, pixel);
#pragma unroll
    for (int i = 0; i < kConvItems; ++i) {
      const i64 o = first_out + own + i * kStride, c = first_in + own + i * kStride;
      grads[i] = inside && o < grad.channels ? load_f32(grad.data, grad.dtype, to.base + o * grad.stride_c) : 0.0f;
      values[i] = inside && c < x.channels ? load_f32(x.data, x.dtype, pixel.base + away + c * x.stride_c) : 0.0f;
    }
  };
  auto land = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kConvItems; ++i) {
      tiles.grad[stage][within][own + i * kStride] = grads[i];
      tiles.x[stage][within][own + i * kStride] = values[i];
    }
    sync_threads();
  };

  float sum[kConvPatch][kConvPatch] = {};
  if (begin < end) bring(begin), land(0);
  int stage = 0;
  for (i64 start = begin; start < end; start += kConvDepth, stage ^= 1) {
    const bool more = start + kConvDepth < end;
    if (more) bring(start + kConvDepth);
    conv_multiply(sum, tiles.grad[stage], tiles.x[stage]);
    if (more) land(stage ^ 1);
  }
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < kConvPatch; ++i)
#pragma unroll
    for (int j = 0; j < kConvPatch; ++j) {
      const i64 o = first_out + conv_patch(ty, i), c = first_in + conv_patch(tx, j);
      if (o < grad.channels && c < x.channels) partial.data[((range * taps + tap) * grad.channels + o) * x.channels + c] = sum[i][j];
    }
}

// Adds the ranges in ascending order, in float64, rounds once; masked entries are zeros. A thread owns an entry.
__global__ void __launch_bounds__(256) conv_weight_finish_kernel(ConvMask mask, PartialWeights partial, void* out, int dtype) {
  const i64 e = i64(blockIdx.x) * 256 + threadIdx.x, size = mask.kernel_height * mask.kernel_width, taps = mask.taps();
  if (e >= mask.out_channels * mask.in_channels * size) return;
  const i64 tap = e % size, c = e / size % mask.in_channels, o = e / size / mask.in_channels;
  double sum = 0;
  for (i64 range = 0; mask.sees(o, c, tap) && range < partial.ranges; ++range)
    sum += double(partial.data[((range * taps + tap) * mask.out_channels + o) * mask.in_channels + c]);
  store(out, dtype, e, double(float(sum)));
}

// ---- gate ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

// Element e of a contiguous [B, C, H, W], C = half of x's channels, and the two values of x that it is made of.
struct GateAt {
  i64 batch, channel, row, column;
  float a, b;
  __device__ GateAt(const GateProblem& p, i64 e) {
    const Images& x = p.x;
    const i64 half = x.channels / 2;
    column = e % x.width, row = e / x.width % x.height, channel = e / x.width / x.height % half, batch = e / x.width / x.height / half;
    const i64 at = batch * x.stride_b + channel * x.stride_c + row * x.stride_h + column * x.stride_w;
    a = load_f32(x.data, x.dtype, at), b = load_f32(x.data, x.dtype, at + half * x.stride_c);
    if (!p.vector) return;
    const i64 of = batch * p.vector_stride_b + channel * p.vector_stride_c;
    a += load_f32(p.vector, x.dtype, of), b += load_f32(p.vector, x.dtype, of + half * p.vector_stride_c);
  }
};

// A thread owns an output. Bytes: x read and out written once.
__global__ void __launch_bounds__(256) gate_kernel(GateProblem p, void* out) {
  const i64 e = i64(blockIdx.x) * 256 + threadIdx.x;
  if (e >= p.x.numel() / 2) return;
  const GateAt at(p, e);
  store(out, p.x.dtype, e, (p.kind == kGateTanh ? tanhf(at.a) : at.a) * sigmoid(at.b));
}

// A thread owns a gate: both gradients. The activations are made again rather than kept.
__global__ void __launch_bounds__(256) gate_backward_kernel(GateProblem p, Images grad, void* out) {
  const i64 e = i64(blockIdx.x) * 256 + threadIdx.x, half = p.x.channels / 2, plane = p.x.height * p.x.width;
  if (e >= p.x.numel() / 2) return;
  const GateAt at(p, e);
  const i64 from = at.batch * grad.stride_b + at.channel * grad.stride_c + at.row * grad.stride_h + at.column * grad.stride_w;
  const float g = load_f32(grad.data, grad.dtype, from);
  const float s = sigmoid(at.b), t = p.kind == kGateTanh ? tanhf(at.a) : at.a;
  const i64 to = e + at.batch * half * plane;  // channel c of picture b in [B, 2 C, H, W]
  store(out, p.x.dtype, to, g * (p.kind == kGateTanh ? (1.0f - t * t) * s : s));
  store(out, p.x.dtype, to + half * plane, g * (t * (s * (1.0f - s))));
}

}  // namespace vq
