#include "straight_through.h"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "element.h"

namespace vqfast {
namespace {

template <class Data>
int64_t place(const Strided<Data>& v, int64_t b, int64_t g, int64_t n) {
  return b * v.stride[0] + g * v.stride[1] + n * v.stride[2];
}

// Values that lie one after the other. False: a difference is not finite, and what was written is of no use.
template <Type type, class Code, class T = typename Element<type>::T>
bool pull_line(const T* x, const T* grad, Code code, float factor, int64_t n, T* out) {
  uint32_t bad = 0;
  const auto pull = [&](int64_t i) {
    const float rest = Element<type>::widen(x[i]) - code(i);
    bad |= (uint32_t)((bits_as<uint32_t>(rest) & 0x7F800000) == 0x7F800000);
    return factor * rest;
  };
  if (grad) for (int64_t i = 0; i < n; ++i) out[i] = Element<type>::narrow(Element<type>::widen(grad[i]) + pull(i));
  else for (int64_t i = 0; i < n; ++i) out[i] = Element<type>::narrow(pull(i));
  return bad == 0;
}

// A block of one tensor: rows and coordinates lie as far apart as `stride` says.
template <class T>
struct Part {
  const T* data = nullptr;
  int64_t stride[2] = {};
};

// Blocks of a tensor, which are copied where neighbours along `axis` do not lie one after the other: coordinates (3), rows (2) or
// whatever it is (-1).
template <class T>
class Parts {
 public:
  Parts(const View* v, int axis) : v_(v), axis_(axis) {
    if (!v || axis < 0 || v->stride[axis] == 1) return;
    most_ = std::min(kRowsTogether, v->size[2]);
    copy_.resize(most_ * v->size[3]);
  }

  Part<T> of(int64_t b, int64_t g, int64_t first, int64_t rows) {
    if (!v_) return {};
    const T* from = static_cast<const T*>(v_->data) + place(*v_, b, g, first);
    const int64_t by_row = v_->stride[2], by_coordinate = v_->stride[3], dim = v_->size[3];
    if (copy_.empty()) return {from, {by_row, by_coordinate}};
    T* to = copy_.data();
    const Part<T> part = {to, {axis_ == 3 ? dim : 1, axis_ == 3 ? 1 : most_}};
    int64_t d = 0;
    for (; axis_ == 3 && by_row == 1 && d + 4 <= dim; d += 4) {  // four columns become parts of rows, written in one piece
      const T* at = from + d * by_coordinate;
      for (int64_t j = 0; j < 4; ++j) fetch_next<0>(at + j * by_coordinate);
      for (int64_t r = 0; r < rows; ++r) {
        const T values[4] = {at[r], at[r + by_coordinate], at[r + 2 * by_coordinate], at[r + 3 * by_coordinate]};
        memcpy(to + r * dim + d, values, sizeof(values));
      }
    }
    for (int64_t r = 0; r < rows && d < dim; ++r)
      for (int64_t i = d; i < dim; ++i) to[r * part.stride[0] + i * part.stride[1]] = from[r * by_row + i * by_coordinate];
    return part;
  }

 private:
  const View* v_;
  int axis_;
  int64_t most_ = 0;  // rows of a copied block
  std::vector<T> copy_;
};

// One block of rows of a group: x, grad, out and, where codes are rows, `written` begin with the first of them.
template <Type type>
struct Block {
  using T = typename Element<type>::T;
  Part<T> x, grad, written;
  T* out;
  const int64_t* out_stride;  // of rows and of coordinates
  const int64_t* index;
  const Rows* codebook;  // where there is no `written`
  int64_t rows, more, dim;  // of the block, and that follow in its place
  float factor;

  static float value(const Part<T>& part, int64_t r, int64_t d) {
    return Element<type>::widen(part.data[r * part.stride[0] + d * part.stride[1]]);
  }

  // Row by row and value by value, whatever lies where.
  void with_care() const {
    for (int64_t r = 0; r < rows; ++r) {
      const auto rest = [&](int64_t d) { return value(x, r, d) - (written.data ? value(written, r, d) : codebook->row(index[r])[d]); };
      bool counts = index[r] >= 0;
      for (int64_t d = 0; counts && d < dim; ++d) counts = (bits_as<uint32_t>(rest(d)) & 0x7F800000) != 0x7F800000;
      for (int64_t d = 0; d < dim; ++d) {
        const float through = grad.data && index[r] >= 0 ? value(grad, r, d) : 0.0f;
        out[r * out_stride[0] + d * out_stride[1]] = Element<type>::narrow(counts ? through + factor * rest(d) : through);
      }
    }
  }

  // Rows whose coordinates lie one after the other.
  bool by_rows() const {
    for (int64_t r = 0; r < rows; ++r) {
      T* to = out + r * out_stride[0];
      const T *from = x.data + r * x.stride[0], *through = grad.data ? grad.data + r * grad.stride[0] : nullptr;
      bool fine;
      if (index[r] < 0) {
        fine = true;
        std::fill(to, to + dim, T(0));
      } else if (written.data) {
        const T* values = written.data + r * written.stride[0];
        fine = pull_line<type>(from, through, [&](int64_t d) { return Element<type>::widen(values[d]); }, factor, dim, to);
      } else {
        const float* values = codebook->row(index[r]);
        fine = pull_line<type>(from, through, [&](int64_t d) { return values[d]; }, factor, dim, to);
      }
      if (!fine) return false;
    }
    return true;
  }

  // Coordinates whose rows lie one after the other: codes are turned around four coordinates at a time.
  bool by_columns(const float* zeros) const {
    const float* from[kRowsTogether];
    float tile[4][kRowsTogether];
    bool fine = true;
    for (int64_t r = 0; r < rows && !written.data; ++r) from[r] = index[r] < 0 ? zeros : codebook->row(index[r]);
    for (int64_t d = 0; d < dim && fine; ++d) {
      if (!written.data && d % 4 == 0) columns_of(from, rows, d, dim, tile);
      const T *column = x.data + d * x.stride[1], *through = grad.data ? grad.data + d * grad.stride[1] : nullptr;
      T* to = out + d * out_stride[1];
      if (more >= kRowsTogether) {
        fetch_next<0>(column);
        if (grad.data) fetch_next<0>(through);
        fetch_next<1>(to);
      }
      const float* values = tile[d % 4];
      if (written.data) {
        const T* given = written.data + d * written.stride[1];
        fine = pull_line<type>(column, through, [&](int64_t r) { return Element<type>::widen(given[r]); }, factor, rows, to);
      } else {
        fine = pull_line<type>(column, through, [&](int64_t r) { return values[r]; }, factor, rows, to);
      }
    }
    for (int64_t r = 0; r < rows && fine; ++r)
      for (int64_t d = 0; index[r] < 0 && d < dim; ++d) out[r + d * out_stride[1]] = T(0);
    return fine;
  }
};

// All values in the order of memory, where all tensors have one layout without gaps and every row counts; else false.
template <Type type>
bool pull_all(const View& x, const View* grad, const View& written, const int64_t* indices, float factor, const Target& out,
              const Parallel& parallel) {
  using T = typename Element<type>::T;
  const int64_t rows = x.size[0] * x.size[1] * x.size[2];
  const auto alike = [&](const View& v) {
    for (int axis = 0; axis < 4; ++axis)
      if (v.size[axis] > 1 && v.stride[axis] != out.stride[axis]) return false;
    return true;
  };
  if (!alike(x) || !alike(written) || (grad && !alike(*grad)) || std::any_of(indices, indices + rows, [](int64_t i) { return i < 0; }))
    return false;
  std::atomic<bool> fine{true};
  parallel(rows * x.size[3], 16384, [&](int64_t begin, int64_t end) {
    const auto at = [&](const View& v) { return static_cast<const T*>(v.data) + begin; };
    const T *values = at(written), *through = grad ? at(*grad) : nullptr;
    const auto code = [&](int64_t i) { return Element<type>::widen(values[i]); };
    if (!pull_line<type>(at(x), through, code, factor, end - begin, static_cast<T*>(out.data) + begin))
      fine.store(false, std::memory_order_relaxed);
  });
  return fine.load();
}

template <Type type>
void pull_group(const View& x, const View* grad, const View* written, const Rows* codebook, const int64_t* indices, float factor,
                const Target& out, int64_t g, const Parallel& parallel) {
  using T = typename Element<type>::T;
  const int64_t groups = x.size[1], n = x.size[2], dim = x.size[3], blocks = (n + kRowsTogether - 1) / kRowsTogether;
  const int axis = out.stride[3] == 1 ? 3 : out.stride[2] == 1 ? 2 : -1;
  const std::vector<float> zeros(dim, 0.0f);
  parallel(x.size[0] * blocks, 8, [&](int64_t begin, int64_t end) {
    Parts<T> of_x(&x, axis), of_grad(grad, axis), of_written(written, axis);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, first = i % blocks * kRowsTogether, rows = std::min(kRowsTogether, n - first);
      const Block<type> block = {of_x.of(b, g, first, rows), of_grad.of(b, g, first, rows), of_written.of(b, g, first, rows),
                                 static_cast<T*>(out.data) + place(out, b, g, first), out.stride + 2,
                                 indices + (b * groups + g) * n + first, codebook, rows, n - first - rows, dim, factor};
      if (!(axis == 3 ? block.by_rows() : axis == 2 && block.by_columns(zeros.data()))) block.with_care();
    }
  });
}

}  // namespace

void straight_through(const View& x, const View* grad, const View& codes, CodesAre codes_are, const int64_t* indices, float factor,
                      const Target& out, const Parallel& parallel) {
  FloatMode mode;
  const auto of_type = [&](auto type) {
    constexpr Type kType = decltype(type)::value;
    const View* written = codes_are == CodesAre::kRows ? &codes : nullptr;
    if (written && pull_all<kType>(x, grad, *written, indices, factor, out, parallel)) return;
    for (int64_t g = 0; g < x.size[1]; ++g) {
      Rows codebook;
      if (!written) codebook = rows_of_group(codes, g, parallel);
      pull_group<kType>(x, grad, written, &codebook, indices, factor, out, g, parallel);
    }
  };
  switch (x.type) {
    case Type::kFloat32: return of_type(std::integral_constant<Type, Type::kFloat32>());
    case Type::kFloat16: return of_type(std::integral_constant<Type, Type::kFloat16>());
    case Type::kBFloat16: return of_type(std::integral_constant<Type, Type::kBFloat16>());
  }
}

}  // namespace vqfast
