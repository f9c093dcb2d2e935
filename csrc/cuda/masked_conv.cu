// Launches masked_conv, its gradients, and the gate.
#include "cuda/masked_conv.cuh"

#include "cuda/layout.h"

namespace vq {

namespace {

constexpr i64 kRangePositions = 1024, kMostRanges = 64;

unsigned blocks_of(i64 items, i64 per_block) { return unsigned(ceil_div(items, per_block)); }

// How the product over positions is cut: by shape alone, so that every device adds in the same order.
i64 ranges_of(const MaskedConvBackward& p) {
  const i64 wanted = ceil_div(p.x.positions(), kRangePositions), allowed = 65535 / (p.mask.taps() ? p.mask.taps() : 1);
  const i64 most = allowed < kMostRanges ? allowed : kMostRanges;
  return wanted < most ? wanted : most;
}

template <class Math>
void convolve(const Images& x, const Kernel& weight, const ConvMask& mask, bool swapped, const PackedWeights<Math>& packed, const void* bias,
              void* out, cudaStream_t stream) {
  const i64 entries = packed.words(mask.taps());
  if (entries) launch(conv_pack_kernel<Math>, dim3(blocks_of(entries, 256)), dim3(256), 0, stream, weight, mask, packed, swapped);
  if (!x.positions() || !packed.outputs) return;
  const dim3 grid(blocks_of(x.positions(), kConvTile), blocks_of(packed.outputs, kConvTile));
  launch(masked_conv_kernel<Math>, grid, dim3(kConvThreads), 0, stream, x, mask, swapped ? -1 : 1, packed, bias, out);
}

template <class Math>
size_t layout_of(const MaskedConvProblem& p, void* memory, PackedWeights<Math>* packed) {
  *packed = {nullptr, p.mask.out_channels, p.mask.in_channels};
  Layout layout(memory);
  layout.place(packed->data, packed->words(p.mask.taps()));
  return layout.bytes();
}

template <class Math>
struct BackwardSpace {
  PackedWeights<Math> packed;
  PartialWeights partial;
};

template <class Math>
size_t layout_of(const MaskedConvBackward& p, void* memory, BackwardSpace<Math>* space) {
  const ConvMask& m = p.mask;
  space->packed = {nullptr, m.in_channels, m.out_channels};
  space->partial = {nullptr, ranges_of(p)};
  Layout layout(memory);
  layout.place(space->packed.data, p.to_x ? space->packed.words(m.taps()) : 0);
  layout.place(space->partial.data, p.to_weight ? space->partial.ranges * m.taps() * m.out_channels * m.in_channels : 0);
  return layout.bytes();
}

template <class Math>
void backward(const MaskedConvBackward& p, void* memory, cudaStream_t stream) {
  BackwardSpace<Math> space;
  layout_of(p, memory, &space);
  const ConvMask& m = p.mask;
  if (p.to_x) convolve(p.grad, p.weight, m, true, space.packed, nullptr, p.to_x, stream);
  const i64 entries = m.out_channels * m.in_channels * m.kernel_height * m.kernel_width;
  if (!p.to_weight || !entries) return;
  const dim3 grid(blocks_of(m.in_channels, kConvTile), blocks_of(m.out_channels, kConvTile), unsigned(space.partial.ranges * m.taps()));
  if (grid.z) launch(conv_weight_kernel<Math>, grid, dim3(kConvThreads), 0, stream, p.grad, p.x, m, space.partial);
  launch(conv_weight_finish_kernel, dim3(blocks_of(entries, 256)), dim3(256), 0, stream, m, space.partial, p.to_weight, p.weight.dtype);
}

// Calls `run` with how pictures of this dtype are multiplied.
template <class Run>
auto with_math(int dtype, Run run) {
  if (dtype == kF32) return run(FloatMath());
  return dtype == kF16 ? run(HalfMath<false>()) : run(HalfMath<true>());
}

}  // namespace

size_t masked_conv_space(const MaskedConvProblem& p) {
  return with_math(p.x.dtype, [&](auto math) {
    PackedWeights<decltype(math)> packed;
    return layout_of(p, nullptr, &packed);
  });
}

void masked_conv(const MaskedConvProblem& p, void* memory, cudaStream_t stream) {
  with_math(p.x.dtype, [&](auto math) {
    PackedWeights<decltype(math)> packed;
    layout_of(p, memory, &packed);
    convolve(p.x, p.weight, p.mask, false, packed, p.bias, p.out, stream);
  });
}

size_t masked_conv_backward_space(const MaskedConvBackward& p) {
  return with_math(p.x.dtype, [&](auto math) {
    BackwardSpace<decltype(math)> space;
    return layout_of(p, nullptr, &space);
  });
}

void masked_conv_backward(const MaskedConvBackward& p, void* memory, cudaStream_t stream) {
  with_math(p.x.dtype, [&](auto math) { backward<decltype(math)>(p, memory, stream); });
}

void gate(const GateProblem& p, void* out, cudaStream_t stream) {
  if (p.x.numel()) launch(gate_kernel, dim3(blocks_of(p.x.numel() / 2, 256)), dim3(256), 0, stream, p, out);
}

void gate_backward(const GateProblem& p, const Images& grad, void* out, cudaStream_t stream) {
  if (p.x.numel()) launch(gate_backward_kernel, dim3(blocks_of(p.x.numel() / 2, 256)), dim3(256), 0, stream, p, grad, out);
}

}  // namespace vq
