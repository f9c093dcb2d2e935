// Strided tensors of any supported dtype: inputs brought to contiguous float rows, rows of floats written to where they belong. Torch-free.
#pragma once
#include <stdint.h>

#include <atomic>
#include <memory>
#include <new>

namespace vqfast {

enum class Type : int { kFloat32, kFloat16, kBFloat16 };

// Strides in elements.
template <class Data>
struct Strided {
  Data* data;
  Type type;
  int64_t size[4];
  int64_t stride[4];
};
using View = Strided<const void>;  // x [B, G, N, D] or a codebook [1, G, K, D]
using Target = Strided<void>;      // rows [B, G, N, D] to be written

// Subnormals kept and round-to-nearest while this stands, whatever the caller's thread had set. In every thread that computes: else bits
// would depend on how many there are. x86-64 only: elsewhere it does nothing, and what the caller's threads have set holds.
class FloatMode {
 public:
  FloatMode();
  ~FloatMode();

 private:
  unsigned saved_;
};

// Runs body(context, begin, end) over [0, n) in pieces of at least `grain`, on torch's threads.
struct Parallel {
  void (*run)(int64_t n, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int threads;

  template <class F>
  void operator()(int64_t n, int64_t grain, F&& body) const {
    if (n <= 0) return;
    run(n, grain, 
        [](void* context, int64_t begin, int64_t end) {
          FloatMode mode;  // of this thread: a pool's threads keep what their creator had set
          (*static_cast<F*>(context))(begin, end);
        },
        (void*)&body);
  }

  // body(next) on the threads, where next() gives the tasks 0..n-1, each to the thread that is free first, and n or more when none is left.
  template <class F>
  void share(int64_t n, F&& body) const {
    std::atomic<int64_t> taken{0};
    (*this)(n < threads ? n : threads, 1, [&](int64_t, int64_t) { body([&] { return taken.fetch_add(1, std::memory_order_relaxed); }); });
  }
};

// Arrays that start on a cache line, so that no vector of a row of whole vectors lies across two.
struct AlignedDelete {
  template <class T>
  void operator()(T* p) const { operator delete[](p, std::align_val_t(64)); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;
using AlignedInts = std::unique_ptr<int32_t[], AlignedDelete>;
inline AlignedFloats aligned_floats(int64_t n) { return AlignedFloats(new (std::align_val_t(64)) float[n]); }
inline AlignedInts aligned_ints(int64_t n) { return AlignedInts(new (std::align_val_t(64)) int32_t[n]); }

constexpr int64_t kRowsTogether = 64;  // that are turned around together: whole cache lines of each coordinate

// Coordinates d..d + 3, or up to the last one, of n rows [dim] as columns; n <= kRowsTogether.
void columns_of(const float* const* rows, int64_t n, int64_t d, int64_t dim, float (*columns)[kRowsTogether]);

// Rows [count, dim] of one group as floats: the input itself where it already lies so, else a widened copy.
struct Rows {
  const float* data = nullptr;
  int64_t ld = 0;
  int64_t count = 0;
  int64_t dim = 0;
  std::unique_ptr<float[]> owned;

  const float* row(int64_t i) const { return data + i * ld; }
};

Rows rows_of_group(const View& view, int64_t group, const Parallel& parallel);

// Writes rows of one group in ascending order, each rounded to the target's type. A few wait until they can be written together: where
// rows lie column by column (channels-first) one alone would touch a cache line for each of its values. What waits must stay as it is.
class RowWriter {
 public:
  RowWriter(const Target& to, int64_t group) : to_(to), group_(group) {}
  ~RowWriter() { flush(); }
  RowWriter(const RowWriter&) = delete;

  // Row number i of B * N, [D]; follows the one before.
  void add(int64_t i, const float* values) {
    if (count_ == kRowsTogether || (count_ > 0 && i % to_.size[2] == 0)) flush();
    if (count_ == 0) first_ = i;
    waiting_[count_++] = values;
  }

 private:
  void flush();

  const Target& to_;
  const int64_t group_;
  int64_t first_ = 0;
  int count_ = 0;
  const float* waiting_[kRowsTogether];
};

}  // namespace vqfast
