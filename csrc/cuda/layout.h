// Lays arrays out in one block of device memory that the caller brings.
#pragma once

#include <cstddef>

#include "cuda/common.cuh"

namespace vq {

// Each array starts at a multiple of 256 bytes. With memory == nullptr it only counts.
class Layout {
 public:
  explicit Layout(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  void place(T*& pointer, i64 count) {
    pointer = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += (size_t(count) * sizeof(T) + 255) / 256 * 256;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

}  // namespace vq
