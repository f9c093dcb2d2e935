// The CPU implementations of nearest, search_hints, gather, code_stats, ema_update_, quantize and residual: checks what only native
// code can rely on, and hands raw pointers to csrc/cpu. LibTorch stable ABI, IMPL only: the schemas are defined in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/ema.h"
#include "cpu/few.h"
#include "cpu/gather.h"
#include "cpu/hints.h"
#include "cpu/nearest.h"
#include "cpu/quantize.h"
#include "cpu/straight_through.h"

#define VQFAST_EXPORT extern "C" __attribute__((visibility("default")))

VQFAST_EXPORT int vqfast_cpu_level_supported() { return vqfast::level_supported(); }
VQFAST_EXPORT int vqfast_cpu_level() { return vqfast::level(); }
VQFAST_EXPORT void vqfast_cpu_level_set(int level) { vqfast::set_level(level); }
// Whether a search of this size may make use of hints.
VQFAST_EXPORT int vqfast_cpu_may_prune(int64_t rows, int64_t codes, int64_t dim) {
  return vqfast::panels_may_pay(rows, codes, dim) && vqfast::few_rows(rows, codes, dim) != vqfast::Few::kYes;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using vqfast::View;

vqfast::Parallel pool() {
  return {[](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          (int)torch::stable::get_num_threads()};
}

vqfast::Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return vqfast::Type::kFloat32;
    case ScalarType::Half: return vqfast::Type::kFloat16;
    case ScalarType::BFloat16: return vqfast::Type::kBFloat16;
    default: STD_TORCH_CHECK(false, name, " has a dtype that the cpu backend does not take; use float32, float16 or bfloat16.");
  }
}

// A tensor of `rank` axes as [.., G, N, D], missing leading axes of size 1.
View view_of(const Tensor& t, int64_t rank, const char* name) {
  STD_TORCH_CHECK(t.dim() == rank, name, " must have ", rank, " axes, it has ", t.dim(), ".");
  View v{t.const_data_ptr(), type_of(t, name), {1, 1, 1, 1}, {0, 0, 0, 0}};
  for (int64_t i = 0; i < rank; ++i) {
    v.size[4 - rank + i] = t.size(i);
    v.stride[4 - rank + i] = t.stride(i);
  }
  return v;
}

// What is to be written like x: its strides where it has neither gaps nor overlaps.
vqfast::Target target_of(Tensor& t) {
  return {t.mutable_data_ptr(), type_of(t, "the result"), {t.size(0), t.size(1), t.size(2), t.size(3)},
          {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

vqfast::Metric metric_of(int64_t metric) {
  STD_TORCH_CHECK(metric >= 0 && metric <= 2, "metric must be 0 (l2), 1 (cosine) or 2 (dot), got ", metric, ".");
  return static_cast<vqfast::Metric>(metric);
}

void check_pair(const View& x, const View& codebook) {
  STD_TORCH_CHECK(x.size[1] == codebook.size[1] && x.size[3] == codebook.size[3], "x and codebook differ in groups or in D.");
  STD_TORCH_CHECK(codebook.size[2] > 0 && codebook.size[3] > 0, "codebook needs at least one code and one dimension.");
  STD_TORCH_CHECK(codebook.size[2] <= INT32_MAX && x.size[0] * x.size[2] <= INT32_MAX, "more than 2^31 codes or rows per group.");
}

template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Hints of every group; owns what had to be rearranged.
struct HintSet {
  std::vector<vqfast::Hints> groups;
  std::vector<int64_t> guess;
  std::vector<Tensor> held;

  HintSet(const View& x, const View& codebook, const Optional& order, const Optional& basis, const Optional& given) {
    const int64_t batches = x.size[0], count = x.size[2], groups_count = x.size[1];
    groups.resize(groups_count);
    if (order) {
      STD_TORCH_CHECK(order->scalar_type() == ScalarType::Long && order->dim() == 2 && order->size(0) == groups_count &&
                          order->size(1) == codebook.size[2],
                      "hint order must be int64 [G, K].");
      held.push_back(torch::stable::contiguous(*order));
      for (int64_t g = 0; g < groups_count; ++g)
        groups[g].order = static_cast<const int64_t*>(held.back().const_data_ptr()) + g * codebook.size[2];
    }
    if (basis) {
      STD_TORCH_CHECK(basis->scalar_type() == ScalarType::Float && basis->dim() == 3 && basis->size(0) == groups_count &&
                          basis->size(2) == codebook.size[3],
                      "hint basis must be float32 [G, p, D].");
      held.push_back(torch::stable::contiguous(*basis));
      for (int64_t g = 0; g < groups_count; ++g) {
        groups[g].basis = static_cast<const float*>(held.back().const_data_ptr()) + g * basis->size(1) * basis->size(2);
        groups[g].directions = basis->size(1);
      }
    }
    if (given) {
      STD_TORCH_CHECK(given->scalar_type() == ScalarType::Long && given->dim() == 3 && given->size(0) == batches &&
                          given->size(1) == groups_count && given->size(2) == count,
                      "hint guess must be int64 [B, G, N].");
      held.push_back(torch::stable::contiguous(*given));
      const int64_t* from = static_cast<const int64_t*>(held.back().const_data_ptr());
      guess.resize(batches * groups_count * count);
      for (int64_t g = 0; g < groups_count; ++g) {
        for (int64_t b = 0; b < batches; ++b)
          for (int64_t n = 0; n < count; ++n)
            guess[(g * batches + b) * count + n] = from[(b * groups_count + g) * count + n];
        groups[g].guess = guess.data() + g * batches * count;
      }
    }
  }
};

const bool* mask_data(const Optional& mask, const View& x, Optional& held) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == x.size[0] &&
                      mask->size(1) == x.size[2],
                  "mask must be bool [B, N].");
  held = torch::stable::contiguous(*mask);
  return static_cast<const bool*>(held->const_data_ptr());
}

// ---- ops -----------------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> nearest_cpu(Tensor x, Tensor codebook, int64_t metric, Optional order, Optional basis, Optional guess) {
  const View rows = view_of(x, 4, "x"), codes = view_of(codebook, 3, "codebook");
  check_pair(rows, codes);
  Tensor distance = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, ScalarType::Long);
  const HintSet hints(rows, codes, order, basis, guess);
  vqfast::nearest(rows, codes, metric_of(metric), hints.groups.data(), mutable_data<float>(distance),
                  mutable_data<int64_t>(indices), pool(), vqfast::Road::kAuto, nullptr);
  return {distance, indices};
}

std::tuple<Tensor, Tensor> search_hints_cpu(Tensor codebook, int64_t metric) {
  const View codes = view_of(codebook, 3, "codebook");
  const int64_t g = codes.size[1], k = codes.size[2], d = codes.size[3];
  STD_TORCH_CHECK(k > 0 && d > 0 && k <= INT32_MAX, "codebook needs 1 to 2^31-1 codes and at least one dimension.");
  Tensor order = torch::stable::new_empty(codebook, {g, k}, ScalarType::Long);
  Tensor basis = torch::stable::new_empty(codebook, {g, vqfast::hint_directions(d), d}, ScalarType::Float);
  vqfast::find_hints(codes, metric_of(metric), mutable_data<int64_t>(order), mutable_data<float>(basis), pool());
  return {order, basis};
}

Tensor gather_cpu(Tensor codebook, Tensor indices) {
  const View codes = view_of(codebook, 3, "codebook");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 3 && indices.size(1) == codes.size[1],
                  "indices must be int64 [B, G, N].");
  const Tensor flat = torch::stable::contiguous(indices);
  Tensor out = torch::stable::new_empty(codebook, {indices.size(0), indices.size(1), indices.size(2), codebook.size(2)});
  const bool valid =
      vqfast::gather(codes, codes.type == vqfast::Type::kFloat32 ? 4 : 2, static_cast<const int64_t*>(flat.const_data_ptr()),
                     indices.size(0), indices.size(2), out.mutable_data_ptr(), pool());
  STD_TORCH_CHECK(valid, "IndexError: an index lies outside -1..", codes.size[2] - 1, ".");
  return out;
}

std::tuple<Tensor, Tensor> code_stats_cpu(Tensor x, Tensor indices, int64_t codebook_size) {
  const View rows = view_of(x, 4, "x");
  const int64_t batches = rows.size[0], groups = rows.size[1], count = rows.size[2], dim = rows.size[3];
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 3 && indices.size(0) == batches &&
                      indices.size(1) == groups && indices.size(2) == count,
                  "indices must be int64 [B, G, N], as x.");
  STD_TORCH_CHECK(codebook_size > 0 && codebook_size <= INT32_MAX, "codebook_size must lie in 1..2^31-1.");
  const Tensor flat = torch::stable::contiguous(indices);
  const int64_t* from = static_cast<const int64_t*>(flat.const_data_ptr());
  Tensor sums = torch::stable::new_empty(x, {groups, codebook_size, dim}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(x, {groups, codebook_size}, ScalarType::Long);
  const vqfast::Parallel parallel = pool();
  std::vector<int64_t> own;
  for (int64_t g = 0; g < groups; ++g) {
    const vqfast::Rows group = vqfast::rows_of_group(rows, g, parallel);
    const int64_t* index = from + g * count;  // [B, G, N]: one run where there is one batch or one group
    if (batches > 1 && groups > 1) {
      own.resize(batches * count);
      for (int64_t b = 0; b < batches; ++b) std::copy_n(from + (b * groups + g) * count, count, own.data() + b * count);
      index = own.data();
    }
    auto run = [&] {
      return vqfast::code_stats(group, index, codebook_size, mutable_data<float>(sums) + g * codebook_size * dim,
                                mutable_data<int64_t>(counts) + g * codebook_size, parallel);
    };
    vqfast::Stats done = run();
    if (done == vqfast::Stats::kNotFinite) {  // rare, so clean rows are not read twice: without those rows, once more
      std::vector<int64_t> kept(index, index + group.count);
      for (int64_t i = 0; i < group.count; ++i) {
        bool finite = true;
        if (kept[i] >= 0) vqfast::kernels().inspect(group.row(i), dim, &finite);
        if (!finite) kept[i] = -1;
      }
      index = kept.data();
      done = run();
    }
    STD_TORCH_CHECK(done != vqfast::Stats::kOutOfRange, "IndexError: an index lies outside -1..", codebook_size - 1, ".");
  }
  return {sums, counts};
}

Tensor straight_through_cpu(Optional grad, Tensor x, Tensor codes, Tensor indices, double factor) {
  Tensor out = torch::stable::empty_like(x);
  const vqfast::Target target = target_of(out);
  const auto like_x = [&](const Tensor& t, const char* name) {
    const View view = view_of(t, 4, name);
    STD_TORCH_CHECK(view.type == target.type && std::equal(view.size, view.size + 4, target.size), name, " must have x's shape and dtype.");
    return view;
  };
  const View rows = view_of(x, 4, "x");
  View through{};
  if (grad) through = like_x(*grad, "grad");
  const bool are_rows = codes.dim() == 4;
  const View given = are_rows ? like_x(codes, "codes") : view_of(codes, 3, "codes");
  if (!are_rows) check_pair(rows, given);
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 3 && indices.size(0) == rows.size[0] &&
                      indices.size(1) == rows.size[1] && indices.size(2) == rows.size[2],
                  "indices must be int64 [B, G, N], as x.");
  const Tensor flat = torch::stable::contiguous(indices);
  const int64_t* index = static_cast<const int64_t*>(flat.const_data_ptr());
  const int64_t most = are_rows ? INT64_MAX : given.size[2] - 1;
  STD_TORCH_CHECK(std::all_of(index, index + indices.numel(), [&](int64_t i) { return i >= -1 && i <= most; }),
                  "IndexError: an index lies outside -1..", most, ".");
  vqfast::straight_through(rows, grad ? &through : nullptr, given, are_rows ? vqfast::CodesAre::kRows : vqfast::CodesAre::kCodebook, index,
                           (float)factor, target, pool());
  return out;
}

void ema_update_cpu_(Tensor codebook, Tensor cluster_size, Tensor cluster_sum, Tensor sums, Tensor counts, Optional frozen,
                     double decay, double eps) {
  for (const Tensor* t : {&codebook, &cluster_size, &cluster_sum})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(), "the state must be contiguous float32.");
  const int64_t groups = codebook.size(0), k = codebook.size(1), dim = codebook.size(2);
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float && counts.scalar_type() == ScalarType::Long,
                  "sums must be float32 and counts int64.");
  STD_TORCH_CHECK(cluster_size.numel() == groups * k && cluster_sum.numel() == groups * k * dim &&
                      sums.numel() == groups * k * dim && counts.numel() == groups * k,
                  "sizes of the state and of the statistics differ.");
  const Tensor dense_sums = torch::stable::contiguous(sums), dense_counts = torch::stable::contiguous(counts);
  Optional dense_frozen;
  if (frozen) {
    STD_TORCH_CHECK(frozen->scalar_type() == ScalarType::Bool && frozen->numel() == groups * k, "frozen must be bool [G, K].");
    dense_frozen = torch::stable::contiguous(*frozen);
  }
  for (int64_t g = 0; g < groups; ++g)
    vqfast::ema_update(mutable_data<float>(codebook) + g * k * dim, mutable_data<float>(cluster_size) + g * k,
                       mutable_data<float>(cluster_sum) + g * k * dim,
                       static_cast<const float*>(dense_sums.const_data_ptr()) + g * k * dim,
                       static_cast<const int64_t*>(dense_counts.const_data_ptr()) + g * k,
                       dense_frozen ? static_cast<const bool*>(dense_frozen->const_data_ptr()) + g * k : nullptr, decay, eps, k,
                       dim, pool());
}

using StepTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

StepTensors quantize_cpu(Tensor x, Tensor codebook, Optional mask, int64_t metric, bool with_sums, Optional order, Optional basis,
                         Optional guess) {
  const View rows = view_of(x, 4, "x"), codes = view_of(codebook, 3, "codebook");
  check_pair(rows, codes);
  const int64_t b = rows.size[0], g = rows.size[1], n = rows.size[2], d = rows.size[3], k = codes.size[2];
  Tensor quantized = torch::stable::empty_like(x);  // in the layout of x: what comes after it reads it as it would have read x
  Tensor sq_error = torch::stable::new_empty(x, {2}, ScalarType::Double);
  Tensor indices = torch::stable::new_empty(x, {b, g, n}, ScalarType::Long);
  Tensor sums = with_sums ? torch::stable::new_empty(x, {g, k, d}, ScalarType::Float)
                          : torch::stable::new_empty(x, {0}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(x, {g, k}, ScalarType::Long);
  Tensor nonfinite = torch::stable::new_empty(x, {}, ScalarType::Long);
  const HintSet hints(rows, codes, order, basis, guess);
  Optional held;
  vqfast::quantize(rows, codes, mask_data(mask, rows, held), metric_of(metric), hints.groups.data(),
                   {target_of(quantized), mutable_data<double>(sq_error), mutable_data<int64_t>(indices),
                    with_sums ? mutable_data<float>(sums) : nullptr, mutable_data<int64_t>(counts),
                    mutable_data<int64_t>(nonfinite)},
                   pool());
  return {quantized, sq_error, indices, sums, counts, nonfinite};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_cpu(Tensor x, Tensor codebooks, Optional mask,
                                                                                int64_t metric, bool with_sums, bool with_pull) {
  const View rows = view_of(x, 4, "x"), codes = view_of(codebooks, 4, "codebooks");
  check_pair(rows, codes);
  const int64_t b = rows.size[0], g = rows.size[1], n = rows.size[2], d = rows.size[3], q = codes.size[0], k = codes.size[2];
  Tensor quantized = torch::stable::empty_like(x);  // in the layout of x: what comes after it reads it as it would have read x
  Tensor sq_error = torch::stable::new_empty(x, {2}, ScalarType::Double);
  Tensor indices = torch::stable::new_empty(x, {q, b, g, n}, ScalarType::Long);
  Tensor sums = with_sums ? torch::stable::new_empty(x, {q, g, k, d}, ScalarType::Float)
                          : torch::stable::new_empty(x, {0}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(x, {q, g, k}, ScalarType::Long);
  Tensor nonfinite = torch::stable::new_empty(x, {}, ScalarType::Long);
  Tensor pull = with_pull ? torch::stable::new_empty(x, {b, g, n, d}, ScalarType::Float)
                          : torch::stable::new_empty(x, {0}, ScalarType::Float);
  Optional held;
  vqfast::residual(rows, codes, mask_data(mask, rows, held), metric_of(metric),
                   {target_of(quantized), mutable_data<double>(sq_error), mutable_data<int64_t>(indices),
                    with_sums ? mutable_data<float>(sums) : nullptr, mutable_data<int64_t>(counts),
                    mutable_data<int64_t>(nonfinite)},
                   with_pull ? mutable_data<float>(pull) : nullptr, pool());
  return {quantized, sq_error, indices, sums, counts, nonfinite, pull};
}

}  // namespace

// What a search does, for tests and reports: x [n, dim] and codebook [k, dim] contiguous; metric and road as in nearest.h; order [k] a hint, or
// null.
// out: road, rows, panels of the codebook, and the sums over rows of groups, panels, evaluations and candidates; then the codes
// that the plans search and those that every row tries by the exact formula.
VQFAST_EXPORT void vqfast_cpu_search_counts(const float* x, int64_t n, const float* codebook, int64_t k, int64_t dim, int metric,
                                            int road, const int64_t* order, float* distance, int64_t* indices, int64_t* out) {
  const View rows{x, vqfast::Type::kFloat32, {1, 1, n, dim}, {n * dim, n * dim, dim, 1}};
  const View codes{codebook, vqfast::Type::kFloat32, {1, 1, k, dim}, {k * dim, k * dim, dim, 1}};
  vqfast::Hints hints;
  hints.order = order;
  const vqfast::Metric by = static_cast<vqfast::Metric>(metric);
  vqfast::SearchReport report;
  vqfast::nearest(rows, codes, by, &hints, distance, indices, pool(), static_cast<vqfast::Road>(road), &report);
  const vqfast::PanelCounts& c = report.counts;
  const int64_t found[] = {(int64_t)report.road, n, report.panels_count, c.groups, c.panels, c.evaluations, c.candidates,
                           report.searched, report.always};
  for (int64_t value : found) *out++ = value;
}

STABLE_TORCH_LIBRARY_IMPL(vqfast, CPU, m) {
  m.impl("nearest_cpu", TORCH_BOX(&nearest_cpu));
  m.impl("search_hints_cpu", TORCH_BOX(&search_hints_cpu));
  m.impl("gather_cpu", TORCH_BOX(&gather_cpu));
  m.impl("code_stats_cpu", TORCH_BOX(&code_stats_cpu));
  m.impl("ema_update_cpu_", TORCH_BOX(&ema_update_cpu_));
  m.impl("quantize_cpu", TORCH_BOX(&quantize_cpu));
  m.impl("straight_through_cpu", TORCH_BOX(&straight_through_cpu));
  m.impl("residual_cpu", TORCH_BOX(&residual_cpu));
}
