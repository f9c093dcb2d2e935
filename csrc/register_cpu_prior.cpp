// The CPU implementations of the prior ops (masked_conv, gate, sample): checks what only native code can rely on, and hands raw
// pointers to csrc/cpu. LibTorch stable ABI, IMPL only: the schemas are defined in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/masked_conv.h"
#include "cpu/sample.h"

// Exported by register_cpu.cpp; a declaration without the attribute would hide it.
extern "C" __attribute__((visibility("default"))) int vqfast_cpu_level();

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

const vqfast::SampleKernels& kernels() {
#if defined(__x86_64__)
  if (vqfast_cpu_level() >= 2) return vqfast::sample_kernels_avx512();
  if (vqfast_cpu_level() == 1) return vqfast::sample_kernels_avx2();
#endif
  return vqfast::sample_kernels_scalar();
}

template <class T>
const T* data(const Optional& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

void check(const Tensor& t, ScalarType type, const char* name, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), name, " must be contiguous ", what, ".");
}

void check_size(const Tensor& t, int64_t numel, const char* name) {
  STD_TORCH_CHECK(t.numel() == numel, name, " holds ", t.numel(), " values, ", numel, " are needed.");
}

// ---- sample ----

void sample_cpu_(Tensor workspace, Tensor tokens, Tensor evaluated, Optional logits, Optional log_prob, Tensor program, Tensor weights,
                 Optional given, Optional condition, Optional labels, int64_t start, int64_t stop, int64_t mode, int64_t lookahead,
                 int64_t seed, int64_t first_image, double temperature, int64_t top_k, double top_p, int64_t threads) {
  check(workspace, ScalarType::Float, "sample: workspace", "float32");
  check(weights, ScalarType::Float, "sample: weights", "float32");
  check(program, ScalarType::Long, "sample: program", "int64");
  check(tokens, ScalarType::Long, "sample: tokens", "int64");
  check(evaluated, ScalarType::Long, "sample: evaluated", "int64");
  check_size(evaluated, 1, "sample: evaluated");
  STD_TORCH_CHECK(tokens.dim() == 3, "sample: tokens must be [B, H, W].");
  STD_TORCH_CHECK(program.numel() >= 7, "sample: malformed program: it ends early.");
  const int64_t batch = tokens.size(0), height = tokens.size(1), width = tokens.size(2), cells = tokens.numel();
  const int64_t* header = static_cast<const int64_t*>(program.const_data_ptr());
  const int64_t codebook_size = header[3], classes = header[5], channels = header[6];
  if (given) check(*given, ScalarType::Bool, "sample: given", "bool"), check_size(*given, cells, "sample: given");
  if (condition) {
    check(*condition, ScalarType::Float, "sample: condition", "float32");
    check_size(*condition, cells * channels, "sample: condition");
  }
  if (labels) {
    check(*labels, ScalarType::Long, "sample: labels", "int64");
    check_size(*labels, batch, "sample: labels");
    const int64_t* label = data<int64_t>(labels);
    for (int64_t b = 0; b < batch; ++b)
      STD_TORCH_CHECK(label[b] >= -1 && label[b] < classes, "sample: label ", label[b], " is not in -1..", classes - 1, ".");
  }
  if (logits) {
    check(*logits, ScalarType::Float, "sample: logits", "float32");
    check_size(*logits, cells * codebook_size, "sample: logits");
  }
  if (log_prob) {
    check(*log_prob, ScalarType::Double, "sample: log_prob", "float64");
    check_size(*log_prob, cells, "sample: log_prob");
  }
  int64_t* token = static_cast<int64_t*>(tokens.mutable_data_ptr());
  const uint8_t* kept = data<uint8_t>(given);
  const int64_t begin = std::clamp<int64_t>(start, 0, height * width), end = std::clamp<int64_t>(stop, 0, height * width);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t p = begin; p < end; ++p) {
      const int64_t at = b * height * width + p;
      if (mode == vqfast::kScore || (kept && kept[at]))
        STD_TORCH_CHECK(token[at] >= 0 && token[at] < codebook_size, "sample: code ", token[at], " is not in 0..", codebook_size - 1, ".");
    }
  STD_TORCH_CHECK(mode == vqfast::kDraw || mode == vqfast::kScore, "sample: mode must be 0 (draw) or 1 (score).");
  STD_TORCH_CHECK(temperature >= 0 && top_p > 0 && top_k >= 0 && lookahead >= 1, "sample: temperature, top_k, top_p or lookahead is out of range.");
  if (batch == 0 || start >= stop) return;
  vqfast::SampleArgs a{};
  a.program = header, a.program_size = program.numel();
  a.weights = static_cast<const float*>(weights.const_data_ptr()), a.weights_size = weights.numel();
  a.workspace = static_cast<float*>(workspace.mutable_data_ptr()), a.workspace_size = workspace.numel();
  a.tokens = token, a.given = kept, a.condition = data<float>(condition), a.labels = data<int64_t>(labels);
  a.logits = logits ? static_cast<float*>(logits->mutable_data_ptr()) : nullptr;
  a.log_prob = log_prob ? static_cast<double*>(log_prob->mutable_data_ptr()) : nullptr;
  a.batch = batch, a.height = height, a.width = width, a.start = start, a.stop = stop, a.mode = mode, a.lookahead = lookahead;
  a.seed = seed, a.first_image = first_image, a.temperature = temperature, a.top_p = top_p, a.top_k = top_k;
  a.threads = static_cast<int>(std::clamp<int64_t>(threads, 1, 64));
  *static_cast<int64_t*>(evaluated.mutable_data_ptr()) += vqfast::sample_run(a, kernels());
}

// ---- masked_conv ----

Tensor masked_conv_cpu(Tensor x, Tensor weight, Optional bias, bool include_center, int64_t dilation, int64_t maps) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float, "masked_conv: the cpu backend takes float32.");
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && x.size(1) == weight.size(1), "masked_conv: x must be [B, Cin, H, W], weight [Cout, Cin, kh, kw].");
  STD_TORCH_CHECK(dilation >= 1 && maps >= 1 && weight.size(0) % maps == 0 && weight.size(1) % maps == 0, "masked_conv: dilation or maps does not fit.");
  STD_TORCH_CHECK(weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1, "masked_conv: kernel sizes must be odd.");
  const vqfast::MaskedConvShape s{x.size(0), x.size(1), weight.size(0), x.size(2), x.size(3), weight.size(2), weight.size(3), dilation, maps, include_center};
  const Tensor w = torch::stable::contiguous(weight);
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float, "masked_conv: the cpu backend takes float32, bias is not; cast it.");
    check_size(*bias, s.out_channels, "masked_conv: bias");
    bias = torch::stable::contiguous(*bias);
  }
  Tensor out = torch::stable::new_empty(x, {s.batch, s.out_channels, s.height, s.width});
  if (out.numel() == 0) return out;
  const int64_t panels = (s.out_channels + vqfast::kWeightPanel - 1) / vqfast::kWeightPanel;
  std::vector<float> packed(panels * vqfast::masked_conv_taps(s) * s.in_channels * vqfast::kWeightPanel);
  vqfast::masked_conv_pack(s, static_cast<const float*>(w.const_data_ptr()), packed.data());
  const float* in = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const float* b = data<float>(bias);
  const int64_t plane = s.out_channels * s.height * s.width;
  // A work item is a picture, or, when there are few, a band of its rows.
  const int64_t bands = std::clamp<int64_t>(16 / s.batch, 1, s.height);
  torch::stable::parallel_for(0, s.batch * bands, 1, [&](int64_t first, int64_t last) {
    std::vector<float> padded(vqfast::masked_conv_padded(s));
    int64_t ready = -1;
    for (int64_t item = first; item < last; ++item) {
      const int64_t image = item / bands, band = item % bands;
      if (image != ready) vqfast::masked_conv_pad(s, in, x.stride(0), x.stride(1), x.stride(2), x.stride(3), image, padded.data());
      ready = image;
      vqfast::masked_conv_rows(s, kernels(), padded.data(), packed.data(), b, s.height * band / bands, s.height * (band + 1) / bands, to + image * plane);
    }
  });
  return out;
}

// ---- gate ----

struct GateShape {
  int64_t batch, channels, plane;
};

GateShape gate_shape(const Tensor& x, const Optional& vector) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 4 && x.size(1) % 2 == 0, "gate: x must be [B, 2 C, H, W] float32.");
  if (vector) {
    STD_TORCH_CHECK(vector->scalar_type() == ScalarType::Float, "gate: vector must be float32.");
    check_size(*vector, x.size(0) * x.size(1), "gate: vector");
  }
  return {x.size(0), x.size(1) / 2, x.size(2) * x.size(3)};
}

template <class F>
void for_planes(const GateShape& s, F f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, s.plane));
  torch::stable::parallel_for(0, s.batch * s.channels, grain, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) f(item / s.channels, item % s.channels);
  });
}

Tensor gate_cpu(Tensor x, Optional vector, int64_t kind) {
  const GateShape s = gate_shape(x, vector);
  if (vector) vector = torch::stable::contiguous(*vector);
  const Tensor dense = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(x, {s.batch, s.channels, x.size(2), x.size(3)});
  const float* in = static_cast<const float*>(dense.const_data_ptr());
  const float* v = data<float>(vector);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  for_planes(s, [&](int64_t b, int64_t c) {
    const int64_t a = b * 2 * s.channels + c, g = a + s.channels;
    vqfast::gate_plane(kernels(), kind == 1, in + a * s.plane, in + g * s.plane, v ? v[a] : 0, v ? v[g] : 0, s.plane,
                       to + (b * s.channels + c) * s.plane);
  });
  return out;
}

Tensor gate_backward_cpu(Tensor grad, Tensor x, Optional vector, int64_t kind) {
  const GateShape s = gate_shape(x, vector);
  if (vector) vector = torch::stable::contiguous(*vector);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float, "gate_backward: grad must be float32, as x is; cast it.");
  check_size(grad, s.batch * s.channels * s.plane, "gate_backward: grad");
  const Tensor dense = torch::stable::contiguous(x), dense_grad = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_empty(x, {s.batch, 2 * s.channels, x.size(2), x.size(3)});
  const float* in = static_cast<const float*>(dense.const_data_ptr());
  const float* g = static_cast<const float*>(dense_grad.const_data_ptr());
  const float* v = data<float>(vector);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  for_planes(s, [&](int64_t b, int64_t c) {
    const int64_t first = b * 2 * s.channels + c, second = first + s.channels;
    vqfast::gate_plane_backward(kernels(), kind == 1, g + (b * s.channels + c) * s.plane, in + first * s.plane, in + second * s.plane,
                                v ? v[first] : 0, v ? v[second] : 0, s.plane, to + first * s.plane, to + second * s.plane);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vqfast, CPU, m) {
  m.impl("sample_cpu_", TORCH_BOX(&sample_cpu_));
  m.impl("masked_conv_cpu", TORCH_BOX(&masked_conv_cpu));
  m.impl("gate_cpu", TORCH_BOX(&gate_cpu));
  m.impl("gate_backward_cpu", TORCH_BOX(&gate_backward_cpu));
}
