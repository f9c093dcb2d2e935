// Registers the CUDA implementations of the ops that vqfast/_border.py defines. LibTorch stable ABI; the only CUDA file that
// knows torch. Shapes and dtypes were checked in Python; what is checked here again would otherwise read wild memory.
//
// With VQFAST_EXECUTOR the same file registers the same ops for CPU tensors, for tests (csrc/testing/executor.h).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "cuda/ema.h"
#include "cuda/gather.h"
#include "cuda/masked_conv.h"
#include "cuda/nearest.h"
#include "cuda/quantize.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vq::i64;

// ---- torch's device, stream and memory ----------------------------------------------------------------------------------------

#ifdef VQFAST_EXECUTOR
#define VQFAST_KEY CPU
class Device {
 public:
  Device(const char*, std::initializer_list<const Tensor*>) {}
  cudaStream_t stream() const { return nullptr; }
};
#else
#define VQFAST_KEY CUDA
// Makes the tensors' device current; launches go to the stream that the user has chosen there. nullptr: an argument left out.
class Device {
 public:
  Device(const char* op, std::initializer_list<const Tensor*> tensors) : index_((*tensors.begin())->get_device_index()), guard_(index_) {
    for (const Tensor* t : tensors)
      STD_TORCH_CHECK(!t || (t->is_cuda() && t->get_device_index() == index_), "vqfast::", op,
                      ": all tensors must be on one CUDA device; move them there.");
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

Tensor new_tensor(const Tensor& like, std::initializer_list<i64> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// Scratch memory lives until the op returns; torch's allocator hands it out again in stream order only.
Tensor scratch(const Tensor& like, size_t bytes) { return new_tensor(like, {i64(bytes)}, ScalarType::Byte); }

void check_launches(const char* op) {
  const char* error = vq::launch_error();
  STD_TORCH_CHECK(!error, "vqfast::", op, " could not be launched: ", error ? error : "");
}

// ---- views ----------------------------------------------------------------------------------------------------------------------

int dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return vq::kF32;
    case ScalarType::Half: return vq::kF16;
    case ScalarType::BFloat16: return vq::kBF16;
    default: STD_TORCH_CHECK(false, "vqfast::", op, " takes float32, float16 and bfloat16; other dtypes run on the reference backend."); return -1;
  }
}

vq::Rows rows_of(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(x.dim() == 4, "vqfast::", op, ": x must be [B, G, N, D], it has ", x.dim(), " axes.");
  STD_TORCH_CHECK(x.size(1) <= 65535, "vqfast::", op, ": at most 65535 groups on CUDA, x has ", x.size(1), ".");
  STD_TORCH_CHECK(x.size(0) * x.size(2) < i64(1) << 31, "vqfast::", op, ": at most 2^31 - 1 rows per group on CUDA; split the batch.");
  return {x.const_data_ptr(), dtype_of(x, op), x.size(0), x.size(1), x.size(2), x.size(3), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

vq::Codes codes_of(const Tensor& codebook, i64 groups, i64 dim, const char* op) {
  const Tensor& c = codebook;
  STD_TORCH_CHECK(c.dim() == 3 && c.size(0) == groups && c.size(2) == dim && c.size(1) > 0 && dim > 0, "vqfast::", op,
                  ": codebook must be [G, K, D] with x's G and D and at least one code and component.");
  STD_TORCH_CHECK(c.size(1) < (i64(1) << 31) - 1, "vqfast::", op, ": at most 2^31 - 2 codes on CUDA.");
  return {c.const_data_ptr(), dtype_of(c, op), c.size(0), c.size(1), c.size(2), c.stride(0), c.stride(1), c.stride(2)};
}

vq::Index index_of(const Tensor& t, const char* op) {
  STD_TORCH_CHECK(t.dim() == 3 && t.scalar_type() == ScalarType::Long, "vqfast::", op, ": indices must be int64 [B, G, N].");
  STD_TORCH_CHECK(t.size(0) * t.size(2) < i64(1) << 31 && t.size(1) <= 65535, "vqfast::", op, ": at most 2^31 - 1 rows and 65535 groups on CUDA.");
  return {static_cast<const i64*>(t.const_data_ptr()), t.size(0), t.size(1), t.size(2), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// ---- ops ------------------------------------------------------------------------------------------------------------------------

const Tensor* or_null(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

int metric_of(i64 metric, const char* op) {
  STD_TORCH_CHECK(metric >= vq::kL2 && metric <= vq::kDot, "vqfast::", op, ": metric must be 0 (l2), 1 (cosine) or 2 (dot), got ", metric, ".");
  return int(metric);
}

using Hint = std::optional<Tensor>;  // hints may cost time, never a code: this backend needs none

std::tuple<Tensor, Tensor> nearest_cuda(const Tensor& x, const Tensor& codebook, i64 metric, const Hint&, const Hint&, const Hint&) {
  const Device device("nearest_cuda", {&x, &codebook});
  vq::NearestProblem p{};
  p.x = rows_of(x, "nearest_cuda");
  p.codebook = codes_of(codebook, p.x.groups, p.x.dim, "nearest_cuda");
  p.metric = metric_of(metric, "nearest_cuda");
  const auto shape = {p.x.batch, p.x.groups, p.x.count};
  Tensor distance = new_tensor(x, shape, ScalarType::Float), indices = new_tensor(x, shape, ScalarType::Long);
  p.distance = data_of<float>(distance), p.indices = data_of<i64>(indices);
  const Tensor memory = scratch(x, vq::nearest_space(p));
  vq::nearest(p, memory.mutable_data_ptr(), device.stream());
  check_launches("nearest_cuda");
  return {distance, indices};
}

Tensor gather_cuda(const Tensor& codebook, const Tensor& indices) {
  const Device device("gather_cuda", {&codebook, &indices});
  const Tensor& c = codebook;
  STD_TORCH_CHECK(c.dim() == 3 && indices.dim() == 3 && c.size(0) == indices.size(1), "vqfast::gather_cuda: codebook must be [G, K, D], indices [B, G, N].");
  vq::GatherProblem p{};
  p.codebook = {c.const_data_ptr(), 0, c.size(0), c.size(1), c.size(2), c.stride(0), c.stride(1), c.stride(2)};
  p.element_bytes = c.scalar_type() == ScalarType::Double ? 8 : c.scalar_type() == ScalarType::Float ? 4 : 2;
  STD_TORCH_CHECK(p.element_bytes != 2 || dtype_of(c, "gather_cuda") >= 0, "");
  p.indices = index_of(indices, "gather_cuda");
  Tensor out = new_tensor(c, {indices.size(0), c.size(0), indices.size(2), c.size(2)}, c.scalar_type());
  p.out = out.mutable_data_ptr();
  vq::gather(p, device.stream());
  check_launches("gather_cuda");
  return out;
}

std::tuple<Tensor, Tensor> code_stats_cuda(const Tensor& x, const Tensor& indices, i64 codebook_size) {
  const Device device("code_stats_cuda", {&x, &indices});
  vq::StatsProblem p{};
  p.x = rows_of(x, "code_stats_cuda");
  p.indices = index_of(indices, "code_stats_cuda");
  STD_TORCH_CHECK(p.indices.batch == p.x.batch && p.indices.groups == p.x.groups && p.indices.count == p.x.count,
                  "vqfast::code_stats_cuda: indices need x's shape without D.");
  STD_TORCH_CHECK(codebook_size > 0 && codebook_size < (i64(1) << 31) - 1, "vqfast::code_stats_cuda: codebook_size must lie in 1..2^31 - 2.");
  p.size = codebook_size;
  Tensor sums = new_tensor(x, {p.x.groups, codebook_size, p.x.dim}, ScalarType::Float);
  Tensor counts = new_tensor(x, {p.x.groups, codebook_size}, ScalarType::Long);
  p.sums = data_of<float>(sums), p.counts = data_of<i64>(counts);
  const Tensor memory = scratch(x, vq::stats_space(p));
  vq::code_stats(p, memory.mutable_data_ptr(), device.stream());
  check_launches("code_stats_cuda");
  return {sums, counts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize_cuda(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask,
                                                                         i64 metric, bool with_sums, const Hint&, const Hint&, const Hint&) {
  const Device device("quantize_cuda", {&x, &codebook, or_null(mask)});
  vq::QuantizeProblem q{};
  q.search.x = rows_of(x, "quantize_cuda");
  const vq::Rows& rows = q.search.x;
  q.search.codebook = codes_of(codebook, rows.groups, rows.dim, "quantize_cuda");
  q.search.metric = metric_of(metric, "quantize_cuda");
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == rows.batch && mask->size(1) == rows.count,
                    "vqfast::quantize_cuda: mask must be bool [B, N].");
    q.search.mask = {static_cast<const unsigned char*>(mask->const_data_ptr()), mask->stride(0), mask->stride(1)};
  }
  const i64 size = q.search.codebook.size;
  Tensor quantized = torch::stable::empty_like(x);  // in the layout of x; the kernels write rows
  const bool in_rows = quantized.is_contiguous();
  Tensor written = in_rows ? quantized : new_tensor(x, {rows.batch, rows.groups, rows.count, rows.dim}, x.scalar_type());
  Tensor sq_error = new_tensor(x, {2}, ScalarType::Double), nonfinite = new_tensor(x, {}, ScalarType::Long);
  Tensor indices = new_tensor(x, {rows.batch, rows.groups, rows.count}, ScalarType::Long);
  Tensor sums = with_sums ? new_tensor(x, {rows.groups, size, rows.dim}, ScalarType::Float) : new_tensor(x, {0}, ScalarType::Float);
  Tensor counts = new_tensor(x, {rows.groups, size}, ScalarType::Long);
  q.quantized = written.mutable_data_ptr(), q.sq_error = data_of<double>(sq_error), q.nonfinite = data_of<i64>(nonfinite);
  q.search.indices = data_of<i64>(indices), q.sums = with_sums ? data_of<float>(sums) : nullptr, q.counts = data_of<i64>(counts);
  const Tensor memory = scratch(x, vq::quantize_space(q));
  vq::quantize(q, memory.mutable_data_ptr(), device.stream());
  check_launches("quantize_cuda");
  if (!in_rows) torch::stable::copy_(quantized, written);
  return {quantized, sq_error, indices, sums, counts, nonfinite};
}

void ema_update_cuda_(const Tensor& codebook, const Tensor& cluster_size, const Tensor& cluster_sum, const Tensor& sums, const Tensor& counts,
                      const std::optional<Tensor>& frozen, double decay, double eps) {
  const Device device("ema_update_cuda_", {&codebook, &cluster_size, &cluster_sum, &sums, &counts, or_null(frozen)});
  const Tensor plain_sums = torch::stable::contiguous(sums), plain_counts = torch::stable::contiguous(counts);
  const Tensor plain_frozen = frozen ? torch::stable::contiguous(*frozen) : plain_counts;
  auto float_or_double = [](const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, "vqfast::ema_update_cuda_ takes float32 or float64.");
    return t.scalar_type() == ScalarType::Double ? vq::kF64 : vq::kF32;
  };
  STD_TORCH_CHECK(codebook.is_contiguous() && cluster_size.is_contiguous() && cluster_sum.is_contiguous(), "vqfast::ema_update_cuda_: the state must be contiguous.");
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && codebook.dim() == 3,
                  "vqfast::ema_update_cuda_: codebook must be [G, K, D], counts int64.");
  const i64 codes = codebook.size(0) * codebook.size(1), values = codebook.numel();
  STD_TORCH_CHECK(cluster_size.numel() == codes && counts.numel() == codes && cluster_sum.numel() == values && sums.numel() == values,
                  "vqfast::ema_update_cuda_: cluster_size and counts must be [G, K], cluster_sum and sums [G, K, D].");
  STD_TORCH_CHECK(!frozen || (frozen->scalar_type() == ScalarType::Bool && frozen->numel() == codes),
                  "vqfast::ema_update_cuda_: frozen must be bool [G, K].");
  vq::EmaProblem p{};
  p.groups = codebook.size(0), p.size = codebook.size(1), p.dim = codebook.size(2);
  p.codebook = codebook.mutable_data_ptr(), p.cluster_size = cluster_size.mutable_data_ptr(), p.cluster_sum = cluster_sum.mutable_data_ptr();
  p.codebook_dtype = float_or_double(codebook), p.size_dtype = float_or_double(cluster_size), p.sum_dtype = float_or_double(cluster_sum);
  p.sums = plain_sums.const_data_ptr(), p.sums_dtype = float_or_double(sums), p.counts = static_cast<const i64*>(plain_counts.const_data_ptr());
  p.frozen = frozen ? static_cast<const unsigned char*>(plain_frozen.const_data_ptr()) : nullptr;
  p.decay = decay, p.eps = eps;
  const Tensor any_row = new_tensor(codebook, {p.groups}, ScalarType::Int);
  p.any_row = static_cast<int*>(any_row.mutable_data_ptr());
  vq::ema_update(p, device.stream());
  check_launches("ema_update_cuda_");
}

// ---- masked_conv --------------------------------------------------------------------------------------------------------------

vq::Images images_of(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(x.dim() == 4, "vqfast::", op, ": pictures must be [B, C, H, W], here are ", x.dim(), " axes.");
  STD_TORCH_CHECK(x.size(0) * x.size(2) * x.size(3) < i64(1) << 31 && x.size(1) <= i64(1) << 22, "vqfast::", op,
                  ": at most 2^31 - 1 positions and 2^22 channels on CUDA; split the batch.");
  return {x.const_data_ptr(), dtype_of(x, op), x.size(0), x.size(1), x.size(2), x.size(3), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

vq::Kernel kernel_of(const Tensor& w, const vq::Images& x, const char* op) {
  STD_TORCH_CHECK(w.dim() == 4 && w.size(1) == x.channels && dtype_of(w, op) == x.dtype, "vqfast::", op,
                  ": weight must be [out, in, kh, kw] with x's channels and dtype.");
  return {w.const_data_ptr(), x.dtype, w.stride(0), w.stride(1), w.stride(2), w.stride(3)};
}

vq::ConvMask conv_mask_of(const Tensor& w, bool include_center, i64 dilation, i64 maps, const char* op) {
  STD_TORCH_CHECK(w.size(2) % 2 == 1 && w.size(3) % 2 == 1 && dilation >= 1, "vqfast::", op, ": kernel sizes must be odd and dilation at least 1.");
  STD_TORCH_CHECK(maps >= 1 && w.size(0) % maps == 0 && w.size(1) % maps == 0, "vqfast::", op, ": maps must divide both numbers of channels.");
  STD_TORCH_CHECK(w.size(0) <= i64(1) << 22 && w.size(2) * w.size(3) <= 65535, "vqfast::", op, ": at most 2^22 channels and 65535 taps on CUDA.");
  return {w.size(0), w.size(1), w.size(2), w.size(3), dilation, maps, include_center};
}

Tensor masked_conv_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool include_center, i64 dilation, i64 maps) {
  const char* op = "masked_conv_cuda";
  const Device device(op, {&x, &weight, or_null(bias)});
  vq::MaskedConvProblem p{};
  p.x = images_of(x, op), p.weight = kernel_of(weight, p.x, op), p.mask = conv_mask_of(weight, include_center, dilation, maps, op);
  const Tensor plain_bias = bias ? torch::stable::contiguous(*bias) : weight;
  STD_TORCH_CHECK(!bias || (plain_bias.numel() == weight.size(0) && dtype_of(plain_bias, op) == p.x.dtype), "vqfast::", op,
                  ": bias must be [out] of x's dtype.");
  p.bias = bias ? plain_bias.const_data_ptr() : nullptr;
  Tensor out = new_tensor(x, {x.size(0), weight.size(0), x.size(2), x.size(3)}, x.scalar_type());
  p.out = out.mutable_data_ptr();
  const Tensor memory = scratch(x, vq::masked_conv_space(p));
  vq::masked_conv(p, memory.mutable_data_ptr(), device.stream());
  check_launches(op);
  return out;
}

std::tuple<Tensor, Tensor> masked_conv_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& weight, bool include_center, i64 dilation,
                                                     i64 maps, bool need_x, bool need_weight) {
  const char* op = "masked_conv_backward_cuda";
  const Device device(op, {&x, &grad, &weight});
  vq::MaskedConvBackward p{};
  p.grad = images_of(grad, op), p.x = images_of(x, op), p.weight = kernel_of(weight, p.x, op);
  p.mask = conv_mask_of(weight, include_center, dilation, maps, op);
  STD_TORCH_CHECK(p.grad.batch == p.x.batch && p.grad.height == p.x.height && p.grad.width == p.x.width && p.grad.channels == weight.size(0) &&
                      p.grad.dtype == p.x.dtype,
                  "vqfast::", op, ": grad must be [B, out, H, W] of x's dtype.");
  Tensor to_x = need_x ? new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type()) : new_tensor(x, {0}, x.scalar_type());
  Tensor to_weight = need_weight ? new_tensor(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, weight.scalar_type())
                                 : new_tensor(weight, {0}, weight.scalar_type());
  p.to_x = need_x ? to_x.mutable_data_ptr() : nullptr, p.to_weight = need_weight ? to_weight.mutable_data_ptr() : nullptr;
  const Tensor memory = scratch(x, vq::masked_conv_backward_space(p));
  vq::masked_conv_backward(p, memory.mutable_data_ptr(), device.stream());
  check_launches(op);
  return {to_x, to_weight};
}

vq::GateProblem gate_of(const Tensor& x, const std::optional<Tensor>& vector, i64 kind, const char* op) {
  vq::GateProblem p{};
  p.x = images_of(x, op), p.kind = int(kind);
  STD_TORCH_CHECK(p.x.channels % 2 == 0, "vqfast::", op, ": x must be [B, 2 C, H, W].");
  if (vector) {
    const bool fits = vector->dim() == 2 && vector->size(0) == p.x.batch && vector->size(1) == p.x.channels;
    STD_TORCH_CHECK(fits && dtype_of(*vector, op) == p.x.dtype, "vqfast::", op, ": vector must be [B, 2 C] of x's dtype.");
    p.vector = vector->const_data_ptr(), p.vector_stride_b = vector->stride(0), p.vector_stride_c = vector->stride(1);
  }
  return p;
}

Tensor gate_cuda(const Tensor& x, const std::optional<Tensor>& vector, i64 kind) {
  const Device device("gate_cuda", {&x, or_null(vector)});
  const vq::GateProblem p = gate_of(x, vector, kind, "gate_cuda");
  Tensor out = new_tensor(x, {x.size(0), x.size(1) / 2, x.size(2), x.size(3)}, x.scalar_type());
  vq::gate(p, out.mutable_data_ptr(), device.stream());
  check_launches("gate_cuda");
  return out;
}

Tensor gate_backward_cuda(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& vector, i64 kind) {
  const Device device("gate_backward_cuda", {&x, &grad, or_null(vector)});
  const vq::GateProblem p = gate_of(x, vector, kind, "gate_backward_cuda");
  const vq::Images g = images_of(grad, "gate_backward_cuda");
  STD_TORCH_CHECK(g.batch == p.x.batch && 2 * g.channels == p.x.channels && g.height == p.x.height && g.width == p.x.width && g.dtype == p.x.dtype,
                  "vqfast::gate_backward_cuda: grad must be [B, C, H, W] of x's dtype.");
  Tensor out = new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  vq::gate_backward(p, g, out.mutable_data_ptr(), device.stream());
  check_launches("gate_backward_cuda");
  return out;
}

}  // namespace

#define VQFAST_IMPL(key, m) STABLE_TORCH_LIBRARY_IMPL(vqfast, key, m)
VQFAST_IMPL(VQFAST_KEY, m) {
  m.impl("nearest_cuda", TORCH_BOX(&nearest_cuda));
  m.impl("gather_cuda", TORCH_BOX(&gather_cuda));
  m.impl("code_stats_cuda", TORCH_BOX(&code_stats_cuda));
  m.impl("quantize_cuda", TORCH_BOX(&quantize_cuda));
  m.impl("ema_update_cuda_", TORCH_BOX(&ema_update_cuda_));
  m.impl("masked_conv_cuda", TORCH_BOX(&masked_conv_cuda));
  m.impl("masked_conv_backward_cuda", TORCH_BOX(&masked_conv_backward_cuda));
  m.impl("gate_cuda", TORCH_BOX(&gate_cuda));
  m.impl("gate_backward_cuda", TORCH_BOX(&gate_backward_cuda));
}
