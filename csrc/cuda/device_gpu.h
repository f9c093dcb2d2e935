// The wrappers of common.cuh on a GPU. Their CPU twins stand in testing/device_cpu.h, in the same order.
#pragma once

#include <cuda_runtime.h>

namespace vq {

// ---- launch: on the caller's stream, nothing waits, nothing is allocated ----------------------------------------------------

// nullptr, or what went wrong with a launch since the last call.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0 ? count : 1;
}

// Whether the current device has wgmma.
inline bool hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

#ifdef __CUDACC__

// Static shared memory of a kernel as it was built for this device; 0 also where it was not.
template <class... P>
size_t static_shared_bytes(void (*kernel)(P...)) {
  cudaFuncAttributes found;
  if (cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel)) == cudaSuccess) return found.sharedSizeBytes;
  cudaGetLastError();  // or the next launch would be blamed
  return 0;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... args) {
  if (shared_bytes > (48 << 10))
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
}

// Static shared memory, one struct per kernel.
#define VQ_SHARED(Type, name) __shared__ Type name
#define VQ_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// ---- synchronisation and warp collectives -----------------------------------------------------------------------------------

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp(uint32_t mask = 0xFFFFFFFFu) { __syncwarp(mask); }
template <class T>
__device__ __forceinline__ T shfl(uint32_t mask, T value, int lane) { return __shfl_sync(mask, value, lane); }
template <class T>
__device__ __forceinline__ T shfl_xor(uint32_t mask, T value, int step) { return __shfl_xor_sync(mask, value, step); }
template <class T>
__device__ __forceinline__ T shfl_up(uint32_t mask, T value, int step) { return __shfl_up_sync(mask, value, step); }
__device__ __forceinline__ uint32_t ballot(uint32_t mask, bool flag) { return __ballot_sync(mask, flag); }
__device__ __forceinline__ uint32_t match_any(uint32_t mask, uint32_t value) { return __match_any_sync(mask, value); }
__device__ __forceinline__ int popcount(uint32_t bits) { return __popc(bits); }

__device__ __forceinline__ int atomic_add(int* at, int value) { return atomicAdd(at, value); }
__device__ __forceinline__ unsigned long long atomic_add(unsigned long long* at, unsigned long long value) { return atomicAdd(at, value); }
__device__ __forceinline__ int atomic_min(int* at, int value) { return atomicMin(at, value); }
__device__ __forceinline__ int atomic_max(int* at, int value) { return atomicMax(at, value); }

// ---- asynchronous copies to shared memory -----------------------------------------------------------------------------------

// 16 bytes, of which the first `valid` come from `from` and the others are zero.
__device__ __forceinline__ void copy_async16(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(valid));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending)); }

// ---- arithmetic: one rounding each, never contracted ------------------------------------------------------------------------

__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double sub(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double div(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ double sqrt_rn(double a) { return __dsqrt_rn(a); }
__device__ __forceinline__ float round_up(double a) { return __double2float_ru(a); }
__device__ __forceinline__ float round_down(double a) { return __double2float_rd(a); }

__device__ __forceinline__ float f16_to_f32(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ float bf16_to_f32(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ uint16_t f32_to_f16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ uint16_t f32_to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// ---- warp-level matrix product: d += a b, 16 x 8 x 16, float16 in, float32 out ----------------------------------------------

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same, bfloat16 in.
__device__ __forceinline__ void mma_16x8x16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif  // __CUDACC__

}  // namespace vq
