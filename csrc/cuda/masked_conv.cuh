// masked_conv: a causal convolution as a matrix product over (tap, channel), of the unmasked taps only, and its gradients; and
// the gate that follows it. float32 sums in one fixed order, no atomics: the same bits every time. float32 pictures are multiplied
// by fused multiply-adds, exactly as the contract's tolerance asks, float16 and bfloat16 ones by tensor cores, whose products are exact.
//
//     out[p, o]        = bias[o] + sum over taps t, channels c:  x[p + t, c] w[t, c, o]       a block owns 128 positions x 128 o
//     to_x[p, c]       =           sum over taps t, outputs o:   grad[p - t, o] w[t, c, o]    the same kernel, taps mirrored
//     to_w[t, o, c]    =           sum over positions p:         grad[p, o] x[p + t, c]       a block owns one tap, 128 o x 128 c
//                                                                                             and one range of positions
#pragma once

#include "cuda/masked_conv.h"

namespace vq {

constexpr int kConvTile = 128;  // positions and channels of a block
constexpr int kConvThreads = 256;

// How a block multiplies. A step brings kDepth words of kPack terms for each of 128 + 128 vectors; a thread owns 64 of the 128^2 sums:
// number i is that of vectors left(i) and right(i).

// float32: fused multiply-adds, terms ascending.
struct FloatMath {
  using Value = float;
  using Word = float;
  static constexpr int kPack = 1, kDepth = 8, kPitch = 128;
  static constexpr int kTurnedPitch = 132;  // 8 words of 4 vectors, written at once, fall into 32 banks
  static constexpr int kTurnedBlocks = 2;   // per multiprocessor, for the gradient to the weights: as many as registers hold
  static __device__ __forceinline__ float load(const void* data, i64 at) { return static_cast<const float*>(data)[at]; }
  static __device__ __forceinline__ float word(const float (&value)[1]) { return value[0]; }

  // Thread (ty, tx) of 16 x 16 owns 8 x 8 sums: 4 t .. 4 t + 3 and 64 + 4 t .. 64 + 4 t + 3 of each side, so that 64 FMAs need 4 reads of 16
  // bytes without conflicts.
  static __device__ __forceinline__ int patch(int t, int i) { return 4 * t + i % 4 + 64 * (i / 4); }
  static __device__ __forceinline__ int left(int i) { return patch(threadIdx.x / 16, i / 8); }
  static __device__ __forceinline__ int right(int i) { return patch(threadIdx.x % 16, i % 8); }

  template <int kRow>
  static __device__ __forceinline__ void multiply(float (&sum)[16][4], const float (&a)[kDepth][kRow], const float (&b)[kDepth][kRow]) {
#pragma unroll 2  // more would spill: two blocks of 256 threads share 65,536 registers
    for (int d = 0; d < kDepth; ++d) {
      float x[8], y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = a[d][patch(threadIdx.x / 16, i)], y[i] = b[d][patch(threadIdx.x % 16, i)];
#pragma unroll
      for (int i = 0; i < 64; ++i) sum[i / 4][i % 4] = fma(x[i / 8], y[i % 8], sum[i / 4][i % 4]);
    }
  }
};

// float16 and bfloat16: tensor cores, 16 terms at a time, float32 sums. A word is a pair of terms.
template <bool kBFloat>
struct HalfMath {
  using Value = uint16_t;
  using Word = u32;
  static constexpr int kPack = 2, kDepth = 16, kPitch = 136, kTurnedPitch = 136;  // 8 more than 128: reads of fragments without conflicts
  static constexpr int kTurnedBlocks = 1;
  static __device__ __forceinline__ uint16_t load(const void* data, i64 at) { return static_cast<const uint16_t*>(data)[at]; }
  static __device__ __forceinline__ u32 word(const uint16_t (&value)[2]) { return u32(value[0]) | u32(value[1]) << 16; }

  // Warp (i, j) of 2 x 4 owns 64 x 32 sums: 4 x 4 products of 16 x 8.
  static __device__ __forceinline__ int left(int i) { return int(threadIdx.x) / 128 * 64 + i / 16 * 16 + i % 4 / 2 * 8 + int(threadIdx.x) % 32 / 4; }
  static __device__ __forceinline__ int right(int i) { return int(threadIdx.x) / 32 % 4 * 32 + i / 4 % 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2; }

  template <int kRow>
  static __device__ __forceinline__ void multiply(float (&sum)[16][4], const u32 (&a)[kDepth][kRow], const u32 (&b)[kDepth][kRow]) {
    const int quad = threadIdx.x % 4, first = left(0), column = right(0) - quad * 2 + int(threadIdx.x) % 32 / 4;
#pragma unroll
    for (int d = 0; d < kDepth; d += 8) {
      u32 y[4][2];
#pragma unroll
      for (int n = 0; n < 4; ++n) y[n][0] = b[d + quad][column + n * 8], y[n][1] = b[d + quad + 4][column + n * 8];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int row = first + m * 16;
        const u32 x[4] = {a[d + quad][row], a[d + quad][row + 8], a[d + quad + 4][row], a[d + quad + 4][row + 8]};
#pragma unroll
        for (int n = 0; n < 4; ++n) kBFloat ? mma_16x8x16_bf16(sum[m * 4 + n], x, y[n]) : mma_16x8x16(sum[m * 4 + n], x, y[n]);
      }
    }
  }
};

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

// ---- weights, packed: [tile of 128 outputs][tap][words of inputs, a whole number of steps][128]; what is masked or padding is zero --------

template <class Math>
struct PackedWeights {
  typename Math::Word* data;
  i64 outputs, inputs;  // of the product that reads it: swapped for the gradient to x

  __host__ __device__ i64 steps() const { return ceil_div(inputs, Math::kDepth * Math::kPack); }  // of one tap
  __host__ __device__ i64 tile_words(i64 taps) const { return taps * steps() * Math::kDepth * kConvTile; }
  __host__ __device__ i64 words(i64 taps) const { return ceil_div(outputs, kConvTile) * tile_words(taps); }
};

template <class Math>
__global__ void __launch_bounds__(256) conv_pack_kernel(Kernel weight, ConvMask mask, PackedWeights<Math> packed, bool swapped) {
  const i64 e = i64(blockIdx.x) * 256 + threadIdx.x, taps = mask.taps(), depth = packed.steps() * Math::kDepth;
  if (e >= packed.words(taps)) return;
  const i64 output = e / packed.tile_words(taps) * kConvTile + e % kConvTile, tap = e / kConvTile / depth % taps;
  typename Math::Value value[Math::kPack];
#pragma unroll
  for (int i = 0; i < Math::kPack; ++i) {
    const i64 input = e / kConvTile % depth * Math::kPack + i, o = swapped ? input : output, c = swapped ? output : input;
    const bool seen = output < packed.outputs && input < packed.inputs && mask.sees(o, c, tap);
    const i64 of_tap = tap / mask.kernel_width * weight.stride_h + tap % mask.kernel_width * weight.stride_w;
    value[i] = seen ? Math::load(weight.data, o * weight.stride_out + c * weight.stride_in + of_tap) : typename Math::Value(0);
  }
  packed.data[e] = Math::word(value);
}

// ---- forward, and the gradient to x -------------------------------------------------------------------------------------------

template <class Math>
struct ConvTiles {  // the next step is brought while this one is multiplied
  alignas(16) typename Math::Word x[2][Math::kDepth][Math::kPitch];
  alignas(16) typename Math::Word w[2][Math::kDepth][Math::kPitch];
};

// Bytes: a step reads 128 vectors of each side for 128^2 products of its terms: 64 products per value from L2.
template <class Math>
__global__ void __launch_bounds__(kConvThreads, 2) masked_conv_kernel(Images x, ConvMask mask, int sign, PackedWeights<Math> packed, const void* bias,
                                                                      void* out) {
  VQ_SHARED(ConvTiles<Math>, tiles);
  constexpr int kStride = kConvThreads / kConvTile, kItems = Math::kDepth / kStride, kCopies = Math::kDepth * kConvTile / (kConvThreads * 4);
  const i64 positions = x.positions(), first = i64(blockIdx.x) * kConvTile, mine = first + threadIdx.x % kConvTile;
  const bool owns = mine < positions;
  const Pixel pixel(x, owns ? mine : 0);
  const i64 taps = mask.taps(), steps = taps * packed.steps();
  const typename Math::Word* from_w = packed.data + blockIdx.y * packed.tile_words(taps) + threadIdx.x * 4;

  // A thread brings one position of every other word, and 4 words of weights or 8.
  const int own = threadIdx.x / kConvTile;
  i64 tap = 0, at = 0;
  int left = 0, left_inside = 0;  // channels of this tap still to come, from the thread's own first one; 0 outside the picture
  auto enter_tap = [&] {
    const Step step(mask, tap, sign);
    left = int(x.channels) - own * Math::kPack;
    left_inside = owns && step.inside(x, pixel) ? left : 0;
    at = pixel.base + step.offset(x) + own * Math::kPack * x.stride_c;
  };
  typename Math::Word brought[kItems];
  auto bring = [&](int stage) {
    i64 from = at;
#pragma unroll
    for (int i = 0; i < kItems; ++i, from += (kStride - 1) * Math::kPack * x.stride_c) {
      typename Math::Value value[Math::kPack];
#pragma unroll
      for (int j = 0; j < Math::kPack; ++j, from += x.stride_c)
        value[j] = i * kStride * Math::kPack + j < left_inside ? Math::load(x.data, from) : typename Math::Value(0);
      brought[i] = Math::word(value);
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int word = threadIdx.x * 4 + i * kConvThreads * 4;
      copy_async16(&tiles.w[stage][word / kConvTile][word % kConvTile], from_w + i * kConvThreads * 4, 16);
    }
    copy_commit();
    constexpr int kTerms = Math::kDepth * Math::kPack;
    from_w += Math::kDepth * kConvTile, at += kTerms * x.stride_c, left -= kTerms, left_inside -= kTerms;
    if (left + own * Math::kPack <= 0) ++tap, enter_tap();
  };
  auto land = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) tiles.x[stage][own + i * kStride][threadIdx.x % kConvTile] = brought[i];
    copy_wait<0>();
    sync_threads();
  };

  const i64 first_out = i64(blockIdx.y) * kConvTile;
  float sum[16][4];
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const i64 o = first_out + Math::right(i);
    sum[i / 4][i % 4] = bias && o < packed.outputs ? load_f32(bias, x.dtype, o) : 0.0f;
  }
  if (steps) enter_tap(), bring(0), land(0);
  for (i64 s = 0; s < steps; ++s) {
    const int stage = int(s & 1);
    if (s + 1 < steps) bring(stage ^ 1);
    Math::multiply(sum, tiles.x[stage], tiles.w[stage]);
    if (s + 1 < steps) land(stage ^ 1);
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const i64 position = first + Math::left(i), o = first_out + Math::right(i), plane = x.height * x.width;
    const i64 picture = u32(position) / u32(plane), within = position - picture * plane;
    if (position < positions && o < packed.outputs) store(out, x.dtype, (picture * packed.outputs + o) * plane + within, sum[i / 4][i % 4]);
  }
}

// ---- gradient to the weights --------------------------------------------------------------------------------------------------

template <class Math>
struct ConvGradTiles {  // words of positions
  alignas(16) typename Math::Word grad[2][Math::kDepth][Math::kTurnedPitch];
  alignas(16) typename Math::Word x[2][Math::kDepth][Math::kTurnedPitch];
};

// Sums of one range of positions: partial[range][tap][out][in].
struct PartialWeights {
  float* data;
  i64 ranges;
};

// blockIdx: x: tile of inputs, y: tile of outputs, z: (range, tap). Bytes: as the forward kernel.
template <class Math>
__global__ void __launch_bounds__(kConvThreads, Math::kTurnedBlocks) conv_weight_kernel(Images grad, Images x, ConvMask mask,
                                                                                        PartialWeights partial) {
  VQ_SHARED(ConvGradTiles<Math>, tiles);
  const i64 taps = mask.taps(), tap = blockIdx.z % taps, range = blockIdx.z / taps, positions = x.positions();
  const i64 begin = positions * range / partial.ranges, end = positions * (range + 1) / partial.ranges;
  const Step step(mask, tap, 1);
  const i64 away = step.offset(x);
  // A thread brings one word of every 32nd or 16th channel, of both sides.
  constexpr int kStride = kConvThreads / Math::kDepth, kItems = kConvTile / kStride, kTerms = Math::kDepth * Math::kPack;
  const int own = threadIdx.x / Math::kDepth, within = threadIdx.x % Math::kDepth;
  const i64 first_out = i64(blockIdx.y) * kConvTile, first_in = i64(blockIdx.x) * kConvTile;

  typename Math::Word grads[kItems], values[kItems];
  auto bring = [&](i64 start) {
    bool inside[Math::kPack];
    i64 from_grad[Math::kPack], from_x[Math::kPack];
#pragma unroll
    for (int j = 0; j < Math::kPack; ++j) {
      const i64 position = start + within * Math::kPack + j;
      const Pixel pixel(x, position < end ? position : begin), to(grad, position < end ? position : begin);
      inside[j] = position < end && step.inside(x, pixel);
      from_grad[j] = to.base, from_x[j] = pixel.base + away;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const i64 o = first_out + own + i * kStride, c = first_in + own + i * kStride;
      typename Math::Value g[Math::kPack], v[Math::kPack];
#pragma unroll
      for (int j = 0; j < Math::kPack; ++j) {
        g[j] = inside[j] && o < grad.channels ? Math::load(grad.data, from_grad[j] + o * grad.stride_c) : typename Math::Value(0);
        v[j] = inside[j] && c < x.channels ? Math::load(x.data, from_x[j] + c * x.stride_c) : typename Math::Value(0);
      }
      grads[i] = Math::word(g), values[i] = Math::word(v);
    }
  };
  auto land = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      tiles.grad[stage][within][own + i * kStride] = grads[i];
      tiles.x[stage][within][own + i * kStride] = values[i];
    }
    sync_threads();
  };

  float sum[16][4] = {};
  if (begin < end) bring(begin), land(0);
  int stage = 0;
  for (i64 start = begin; start < end; start += kTerms, stage ^= 1) {
    const bool more = start + kTerms < end;
    if (more) bring(start + kTerms);
    Math::multiply(sum, tiles.grad[stage], tiles.x[stage]);
    if (more) land(stage ^ 1);
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const i64 o = first_out + Math::left(i), c = first_in + Math::right(i);
    if (o < grad.channels && c < x.channels) partial.data[((range * taps + tap) * grad.channels + o) * x.channels + c] = sum[i / 4][i % 4];
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
