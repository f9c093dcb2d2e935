// What all CUDA kernels share: thin wrappers of intrinsics, element types, strided views, launches.
//
// Under nvcc the wrappers are the intrinsics. Under VQFAST_EXECUTOR the same source is plain C++ that csrc/testing/executor.h
// runs on a CPU. Kernels use nothing of CUDA but these wrappers, threadIdx, blockIdx, blockDim and gridDim. The views also compile
// as host C++, for register_cuda.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef VQFAST_EXECUTOR
#include "testing/device_cpu.h"
#else
#include "cuda/device_gpu.h"
#endif

namespace vq {

using i64 = int64_t;
using u32 = uint32_t;
using u64 = uint64_t;

constexpr u32 kFullWarp = 0xFFFFFFFFu;

enum DType : int { kF32 = 0, kF16 = 1, kBF16 = 2, kF64 = 3 };
enum Metric : int { kL2 = 0, kCosine = 1, kDot = 2 };

__host__ __device__ inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// ---- views: strides in elements, any sign, 64-bit ---------------------------------------------------------------------------

// A group has fewer than 2^31 rows (register_cuda.cpp sees to it), so that finding a row's batch is a 32-bit division.
struct BatchRow {
  i64 batch, position;
  __device__ BatchRow(i64 row, i64 count) : batch(u32(row) / u32(count)), position(row - batch * count) {}
};

struct Rows {  // [B, G, N, D]; "row r of group g" is batch r / N, position r % N
  const void* data;
  int dtype;
  i64 batch, groups, count, dim;
  i64 stride_b, stride_g, stride_n, stride_d;

  __host__ __device__ i64 rows() const { return batch * count; }  // of one group
  __device__ i64 base(i64 group, i64 row) const {
    const BatchRow at(row, count);
    return at.batch * stride_b + group * stride_g + at.position * stride_n;
  }
  // Where the row stands in a contiguous [B, G, N] tensor.
  __device__ i64 place(i64 group, i64 row) const {
    const BatchRow at(row, count);
    return (at.batch * groups + group) * count + at.position;
  }
  // Neighbouring threads should take neighbouring rows instead of neighbouring components (channels-first images).
  __host__ __device__ bool rows_adjacent() const { return stride_n == 1 && stride_d != 1; }
};

struct Index {  // [B, G, N] int64
  const i64* data;
  i64 batch, groups, count;
  i64 stride_b, stride_g, stride_n;

  __host__ __device__ i64 rows() const { return batch * count; }  // of one group
  __device__ i64 at(i64 group, i64 row) const {
    const BatchRow from(row, count);
    return data[from.batch * stride_b + group * stride_g + from.position * stride_n];
  }
};

struct Codes {  // [G, K, D]
  const void* data;
  int dtype;
  i64 groups, size, dim;
  i64 stride_g, stride_k, stride_d;

  __device__ i64 base(i64 group, i64 code) const { return group * stride_g + code * stride_k; }
};

#if defined(__CUDACC__) || defined(VQFAST_EXECUTOR)

// ---- elements: every value is taken exactly ---------------------------------------------------------------------------------

__device__ __forceinline__ float load_f32(const void* data, int dtype, i64 offset) {
  if (dtype == kF32) return static_cast<const float*>(data)[offset];
  const uint16_t bits = static_cast<const uint16_t*>(data)[offset];
  return dtype == kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

__device__ __forceinline__ double load_f64(const void* data, int dtype, i64 offset) {
  return dtype == kF64 ? static_cast<const double*>(data)[offset] : double(load_f32(data, dtype, offset));
}

// Stores a value rounded once to dtype; a float64 value must be one that float32 holds, unless dtype is float64 or float32.
__device__ __forceinline__ void store(void* data, int dtype, i64 offset, double value) {
  if (dtype == kF64) {
    static_cast<double*>(data)[offset] = value;
  } else if (dtype == kF32) {
    static_cast<float*>(data)[offset] = float(value);
  } else {
    static_cast<uint16_t*>(data)[offset] = dtype == kF16 ? f32_to_f16(float(value)) : f32_to_bf16(float(value));
  }
}

__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) <= 3.40282347e38f; }
__device__ __forceinline__ bool is_finite(double value) { return fabs(value) <= 1.7976931348623157e308; }

// ---- small collectives ------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T warp_sum(T value) {  // a fixed tree: the same bits every time
  for (int step = 16; step; step >>= 1) value += shfl_xor(kFullWarp, value, step);
  return value;
}

#endif

}  // namespace vq
