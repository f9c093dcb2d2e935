// Microbenchmarks of one GPU: what the designs in csrc/cuda stand on. Prints one JSON object a line: {"what", "value", "unit"}.
//
//     nvcc -std=c++17 -O3 -Icsrc -gencode=arch=compute_90a,code=sm_90a bench/gpu_micro.cu -o gpu_micro && ./gpu_micro
//
// bench/gpu_micro.py does that. On GPUs before Hopper the parts that need wgmma, clusters or bulk reductions are left out.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/hopper_gpu.h"

namespace {

using namespace vq;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "gpu_micro: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

void print(const std::string& what, double value, const char* unit) {
  std::printf("{\"what\": \"%s\", \"value\": %.6g, \"unit\": \"%s\"}\n", what.c_str(), value, unit);
  std::fflush(stdout);
}

template <class T>
class OnDevice {
 public:
  explicit OnDevice(size_t count) : count_(count) {
    check(cudaMalloc(&at_, count * sizeof(T)), "cudaMalloc");
    check(cudaMemset(at_, 0, count * sizeof(T)), "cudaMemset");
  }
  explicit OnDevice(const std::vector<T>& values) : OnDevice(values.size()) {
    check(cudaMemcpy(at_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(at_); }
  operator T*() const { return at_; }
  std::vector<T> values() const {
    std::vector<T> found(count_);
    check(cudaMemcpy(found.data(), at_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "a kernel");
    return found;
  }

 private:
  T* at_ = nullptr;
  size_t count_;
};

template <class T>
double median(std::vector<T> values) {
  std::sort(values.begin(), values.end());
  return double(values[values.size() / 2]);
}

// Median microseconds of `work` on `stream`, by events, after two runs that do not count.
template <class Work>
double microseconds(Work work, cudaStream_t stream = nullptr) {
  cudaEvent_t start, end;
  cudaEventCreate(&start), cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    cudaEventRecord(start, stream);
    work();
    cudaEventRecord(end, stream);
    check(cudaEventSynchronize(end), "a kernel");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, end);
    if (i >= 2) times.push_back(ms);
  }
  cudaEventDestroy(start), cudaEventDestroy(end);
  return 1e3 * median(times);
}

// ---- rates of single instructions, alone and beside wgmma -----------------------------------------------------------------------

struct Lop3 {
  static constexpr const char* kName = "LOP3";
  __device__ static int apply(int a, int b, int c) { return with_id(__int_as_float(a), u32(b), u32(c)); }
};
struct Vimnmx {
  static constexpr const char* kName = "VIMNMX";
  __device__ static int apply(int a, int b, int) { return min(a, b); }
};
struct Vimnmx3 {
  static constexpr const char* kName = "VIMNMX3";
  __device__ static int apply(int a, int b, int c) { return min3(a, b, c); }
};
struct Viaddmnmx {
  static constexpr const char* kName = "VIADDMNMX";
  __device__ static int apply(int a, int b, int c) { return __viaddmin_s32(a, b, c); }
};
struct Vhmnmx {  // two float16 at once; the compiler merges the pair of minima into one with three inputs
  static constexpr const char* kName = "VHMNMX";
  __device__ static int apply(int a, int b, int c) {
    const __half2 least = __hmin2(__hmin2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b)), reinterpret_cast<__half2&>(c));
    return reinterpret_cast<const int&>(least);
  }
};
struct Fmnmx {
  static constexpr const char* kName = "FMNMX";
  __device__ static int apply(int a, int b, int) { return __float_as_int(fminf(__int_as_float(a), __int_as_float(b))); }
};
struct Ffma {
  static constexpr const char* kName = "FFMA";
  __device__ static int apply(int a, int b, int c) { return __float_as_int(fmaf(__int_as_float(a), __int_as_float(b), __int_as_float(c))); }
};

constexpr int kChains = 16, kRounds = 256;

// Each value is replaced by a function of itself and two others, which change in turn, so that no step can be left out.
template <class Op>
__device__ __forceinline__ int run_chains(int seed) {
  int value[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) value[i] = seed * (2 * i + 1);
#pragma unroll 4
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < kChains; ++i) value[i] = Op::apply(value[i], value[(i + 5) % kChains], value[(i + 11) % kChains]);
  int all = 0;
#pragma unroll
  for (int i = 0; i < kChains; ++i) all ^= value[i];
  return all;
}

template <class Op>
__global__ void rate_kernel(int seed, int* out, long long* clocks) {
  __syncthreads();
  const long long start = clock64();
  const int value = run_chains<Op>(seed + int(threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

template <class Op>
void rate(int units) {
  constexpr int kThreads = 1024;
  OnDevice<int> out(size_t(units) * kThreads);
  OnDevice<long long> clocks(units);
  for (int i = 0; i < 3; ++i) rate_kernel<Op><<<units, kThreads>>>(12345, out, clocks);
  print(std::string(Op::kName) + " alone", double(kThreads) * kChains * kRounds / median(clocks.values()), "lanes/clock/SM");
}

constexpr int kProducts = 512;

// Warpgroup 0 makes 64 x 128 x 16 products back to back if it `multiplies`; warpgroups 1 and 2 run chains if they `scan`.
template <class Op>
__global__ void __launch_bounds__(384, 1) beside_kernel(int seed, bool multiplies, bool scans, int* out, long long* clocks) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ __align__(1024) unsigned char codes[4096];
  for (int i = threadIdx.x; i < 4096; i += 384) codes[i] = 0;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const long long start = clock64();
  int value = 0;
  if (threadIdx.x < 128) {
    float acc[64] = {};
    const u32 a[4] = {u32(seed), u32(seed), u32(seed), u32(seed)};
#pragma unroll 1  // or ptxas takes many minutes
    for (int i = 0; multiplies && i < kProducts / 8; ++i) {
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 8; ++j) wgmma_64x128x16<true>(acc, a, matrix_at(codes));
      wgmma_commit();
      wgmma_wait<0>(acc);
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) value ^= __float_as_int(acc[i]);
  } else if (scans) {
    value = run_chains<Op>(seed + int(threadIdx.x));
  }
  __syncthreads();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
  out[blockIdx.x * 384 + threadIdx.x] = value;
#endif
}

template <class Op>
void beside(int units, bool first) {
  OnDevice<int> out(size_t(units) * 384);
  OnDevice<long long> clocks(units);
  double took[4] = {};
  for (int which = 1; which < 4; ++which) {
    for (int i = 0; i < 3; ++i) beside_kernel<Op><<<units, 384>>>(0, which & 1, which & 2, out, clocks);
    took[which] = median(clocks.values());
  }
  if (first) print("wgmma 64x128x16 alone, one warpgroup", took[1] / kProducts, "clocks");
  const std::string name = std::string(Op::kName) + " in two warpgroups beside wgmma in a third: ";
  print(name + "time alone over wgmma's alone", took[2] / took[1], "ratio");
  print(name + "time together over the longer alone", took[3] / std::max(took[1], took[2]), "ratio");  // 1: one hides the other
}

// ---- how tensor cores add ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 pair_at(const uint16_t* at) { return u32(at[0]) | u32(at[1]) << 16; }

// A 16 x 8 x 16 product per block, added to `start`: a [16, 16], b [8, 16], start and d [16, 8].
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, const float* start, float* d) {
  const int row = int(threadIdx.x) / 4, quad = int(threadIdx.x) % 4;
  a += i64(blockIdx.x) * 256, b += i64(blockIdx.x) * 128, start += i64(blockIdx.x) * 128, d += i64(blockIdx.x) * 128;
  u32 left[4], right[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) left[i] = pair_at(a + (row + 8 * (i % 2)) * 16 + i / 2 * 8 + quad * 2);
  for (int i = 0; i < 2; ++i) right[i] = pair_at(b + row * 16 + i * 8 + quad * 2);
  for (int i = 0; i < 4; ++i) sum[i] = start[(row + 8 * (i / 2)) * 8 + quad * 2 + i % 2];
  mma_16x8x16(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(row + 8 * (i / 2)) * 8 + quad * 2 + i % 2] = sum[i];
}

// The same with wgmma: a [64, 16], b [128, 16], start and d [64, 128].
__global__ void __launch_bounds__(128) wgmma_kernel(const uint16_t* a, const uint16_t* b, const float* start, float* d) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ __align__(1024) uint16_t codes[2048];
  a += i64(blockIdx.x) * 1024, b += i64(blockIdx.x) * 2048, start += i64(blockIdx.x) * 8192, d += i64(blockIdx.x) * 8192;
  for (int i = threadIdx.x; i < 2048; i += 128) codes[i % 16 / 8 * 1024 + i / 128 * 64 + i / 16 % 8 * 8 + i % 8] = b[i];  // as matrix_at says
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32 * 16 + lane / 4, quad = lane % 4;
  u32 left[4];
  for (int i = 0; i < 4; ++i) left[i] = pair_at(a + (row + 8 * (i % 2)) * 16 + i / 2 * 8 + quad * 2);
  float acc[64];
  auto place = [&](int i) { return (row + 8 * (i / 2 % 2)) * 128 + i / 4 * 8 + quad * 2 + i % 2; };
#pragma unroll
  for (int i = 0; i < 64; ++i) acc[i] = start[place(i)];
  wgmma_fence();
  wgmma_64x128x16<true>(acc, left, matrix_at(codes));
  wgmma_commit();
  wgmma_wait<0>(acc);
#pragma unroll
  for (int i = 0; i < 64; ++i) d[place(i)] = acc[i];
#endif
}

uint16_t half_bits(float value) { return __half_raw(__float2half_rn(value)).x; }
double half_value(uint16_t bits) {
  __half_raw raw;
  raw.x = bits;
  return double(__half2float(__half(raw)));
}

// The largest error of one k16 step in units of 2^-23 of the sum of all magnitudes; tensor_core_bound() takes 18 for granted. Rows and
// columns in turn are of one scale and of many, since what is cut is what the largest term's exponent leaves no room for.
template <class Kernel>
void addition(const char* name, Kernel kernel, int rows, int columns, int threads) {
  constexpr int kBlocks = 512;
  std::mt19937 random(1);
  std::uniform_int_distribution<int> spread(-10, 4);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> a(size_t(kBlocks) * rows * 16), b(size_t(kBlocks) * columns * 16);
  std::vector<float> start(size_t(kBlocks) * rows * columns);
  for (std::vector<uint16_t>* side : {&a, &b})
    for (size_t i = 0; i < side->size(); ++i) (*side)[i] = half_bits(std::ldexp(normal(random), i / 16 % 2 ? spread(random) : 0));
  for (float& value : start) value = std::ldexp(normal(random), 2 * spread(random));
  const OnDevice<uint16_t> device_a(a), device_b(b);
  const OnDevice<float> device_start(start), device_d(start.size());
  kernel<<<kBlocks, threads>>>(device_a, device_b, device_start, device_d);
  const std::vector<float> d = device_d.values();
  double worst = 0;
  for (size_t at = 0; at < d.size(); ++at) {
    const size_t row = at / columns, column = row / rows * columns + at % columns;
    double sum = start[at], magnitude = std::fabs(sum);
    for (int k = 0; k < 16; ++k) {
      const double term = half_value(a[row * 16 + k]) * half_value(b[column * 16 + k]);
      sum += term, magnitude += std::fabs(term);
    }
    worst = std::max(worst, std::fabs(double(d[at]) - sum) / magnitude * 0x1p23);
  }
  print(std::string(name) + ": largest error of one k16 step; the screens allow 18", worst, "2^-23 of the magnitudes");
}

// ---- launches and clusters --------------------------------------------------------------------------------------------------------

__global__ void empty_kernel() {}

void launches() {
  constexpr int kKernels = 100;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < kKernels; ++i) empty_kernel<<<1, 32, 0, stream>>>();
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  print("an empty kernel after another in a graph", microseconds([&] { cudaGraphLaunch(replay, stream); }, stream) / kKernels, "us");
  cudaGraphExecDestroy(replay), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
}

constexpr int kMeetings = 1000;

__global__ void cluster_kernel(long long* clocks) {
#if __CUDA_ARCH__ >= 900
  const long long start = clock64();
#pragma unroll 4
  for (int i = 0; i < kMeetings; ++i)
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
#endif
}

// A chain of dependent reads from the next block's shared memory, which holds addresses as that block's neighbour sees them.
__global__ void neighbour_kernel(int blocks, int* out, long long* clocks) {
#if __CUDA_ARCH__ >= 900
  __shared__ u32 next[256];
  const u32 local = u32(__cvta_generic_to_shared(next));
  u32 rank, own, remote;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(own) : "r"(local), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"((rank + 1) % u32(blocks)));
  for (int i = threadIdx.x; i < 256; i += blockDim.x) next[i] = own + u32((i + 37) % 256) * 4;
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  u32 at = remote;
  const long long start = clock64();
#pragma unroll 4
  for (int i = 0; i < kMeetings; ++i) asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(at) : "r"(at) : "memory");
  const long long end = clock64();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - start, out[blockIdx.x] = int(at);
#endif
}

template <class... P, class... A>
bool launch_cluster(void (*kernel)(P...), int blocks, int threads, A... arguments) {
  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(blocks), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(unsigned(threads)), config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess;
}

void clusters() {
  for (int blocks : {2, 4, 8, 16}) {
    const OnDevice<long long> clocks(16);
    const OnDevice<int> out(16);
    const std::string of = " in a cluster of " + std::to_string(blocks);
    for (int i = 0; i < 2; ++i)
      if (!launch_cluster(cluster_kernel, blocks, 128, (long long*)clocks)) return print("no cluster of blocks", blocks, "blocks");
    print("barrier" + of, double(clocks.values()[0]) / kMeetings, "clocks");
    launch_cluster(neighbour_kernel, blocks, 32, blocks, (int*)out, (long long*)clocks);
    print("read of a neighbour's shared memory" + of, double(clocks.values()[0]) / kMeetings, "clocks");
  }
}

// ---- sums by code, under skew ------------------------------------------------------------------------------------------------------

constexpr int kRows = 1 << 20, kCodes = 8192, kDim = 64;  // zeros: what is added does not change the time

// 16 threads add a row of 64 floats to its code's sum in global memory.
struct AddFloat {
  static constexpr const char* kName = "float adds, one at a time";
  __device__ static void add(float* to, float4 value) {
    atomicAdd(to, value.x), atomicAdd(to + 1, value.y), atomicAdd(to + 2, value.z), atomicAdd(to + 3, value.w);
  }
};
struct AddFloat4 {
  static constexpr const char* kName = "float adds, four at a time";
  __device__ static void add(float* to, float4 value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w) : "memory");
#endif
  }
};
struct AddFixed {  // order does not matter, so the sums are the same bits every time
  static constexpr const char* kName = "fixed-point adds";
  __device__ static void add(float* to, float4 value) {
    int* at = reinterpret_cast<int*>(to);
    const float scale = 65536;
    atomicAdd(at, int(value.x * scale)), atomicAdd(at + 1, int(value.y * scale));
    atomicAdd(at + 2, int(value.z * scale)), atomicAdd(at + 3, int(value.w * scale));
  }
};

template <class Add>
__global__ void __launch_bounds__(256) scatter_kernel(const float4* x, const int* code, float* sums) {
  const int row = int(blockIdx.x) * 16 + int(threadIdx.x) / 16, part = int(threadIdx.x) % 16;
  Add::add(sums + i64(code[row]) * kDim + part * 4, x[i64(row) * 16 + part]);
}

// A thread hands a row of 256 bytes, staged in shared memory, to the copy engine, which adds it.
__global__ void __launch_bounds__(256) bulk_kernel(const float4* x, const int* code, float* sums) {
#if __CUDA_ARCH__ >= 900
  __shared__ __align__(128) float4 rows[256];
  rows[threadIdx.x] = x[i64(blockIdx.x) * 256 + threadIdx.x];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x < 16) {
    const u32 from = u32(__cvta_generic_to_shared(rows + threadIdx.x * 16));
    float* to = sums + i64(code[blockIdx.x * 16 + threadIdx.x]) * kDim;
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 256;" ::"l"(to), "r"(from) : "memory");
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
  }
#endif
}

// Counts alone: integer adds in shared memory, then once per code and block in global memory.
__global__ void __launch_bounds__(1024) private_count_kernel(const int* code, int* counts) {
  extern __shared__ int own[];
  for (int k = threadIdx.x; k < kCodes; k += 1024) own[k] = 0;
  __syncthreads();
  for (int row = int(blockIdx.x) * 1024 + int(threadIdx.x); row < kRows; row += int(gridDim.x) * 1024) atomicAdd(own + code[row], 1);
  __syncthreads();
  for (int k = threadIdx.x; k < kCodes; k += 1024)
    if (own[k]) atomicAdd(counts + k, own[k]);
}
__global__ void __launch_bounds__(256) plain_count_kernel(const int* code, int* counts) { atomicAdd(counts + code[blockIdx.x * 256 + threadIdx.x], 1); }

void sums_by_code(int units, bool is_hopper) {
  std::mt19937 random(2);
  std::uniform_int_distribution<int> any(0, kCodes - 1);
  std::vector<double> weight(kCodes);
  for (int k = 0; k < kCodes; ++k) weight[k] = 1.0 / (k + 1);
  std::discrete_distribution<int> zipf(weight.begin(), weight.end());
  const OnDevice<float4> x(size_t(kRows) * kDim / 4);
  const OnDevice<float> sums(size_t(kCodes) * kDim);
  const OnDevice<int> counts(kCodes);
  const size_t own_bytes = kCodes * sizeof(int);
  for (const char* skew : {"uniform codes", "Zipf codes", "half of the rows on one code"}) {
    std::vector<int> code(kRows);
    for (int i = 0; i < kRows; ++i) code[i] = skew[0] == 'Z' ? zipf(random) : skew[0] == 'h' && i % 2 ? 7 : any(random);
    const OnDevice<int> codes(code);
    auto show = [&](const char* what, double us) { print(std::string(what) + ", " + skew, us, "us"); };
    show(AddFloat::kName, microseconds([&] { scatter_kernel<AddFloat><<<kRows / 16, 256>>>(x, codes, sums); }));
    show(AddFixed::kName, microseconds([&] { scatter_kernel<AddFixed><<<kRows / 16, 256>>>(x, codes, sums); }));
    if (is_hopper) {
      show(AddFloat4::kName, microseconds([&] { scatter_kernel<AddFloat4><<<kRows / 16, 256>>>(x, codes, sums); }));
      show("bulk reductions of whole rows", microseconds([&] { bulk_kernel<<<kRows / 16, 256>>>(x, codes, sums); }));
    }
    show("counts in global memory", microseconds([&] { plain_count_kernel<<<kRows / 256, 256>>>(codes, counts); }));
    show("counts in shared memory first", microseconds([&] { private_count_kernel<<<2 * units, 1024, own_bytes>>>(codes, counts); }));
  }
  const OnDevice<float4> copy(size_t(kRows) * kDim / 4);
  print("copying the rows, which reads and writes them once",
        microseconds([&] { cudaMemcpyAsync(copy, x, size_t(kRows) * kDim * sizeof(float), cudaMemcpyDeviceToDevice); }), "us");
}

template <class... Ops>
void all_rates(int units, bool is_hopper) {
  (rate<Ops>(units), ...);
  bool first = true;
  if (is_hopper) ((beside<Ops>(units, first), first = false), ...);
}

}  // namespace

int main() {
  const int units = multiprocessors();
  const bool is_hopper = hopper();
  all_rates<Ffma, Lop3, Vimnmx, Vimnmx3, Viaddmnmx, Vhmnmx, Fmnmx>(units, is_hopper);
  addition("mma m16n8k16", mma_kernel, 16, 8, 32);
  if (is_hopper) addition("wgmma m64n128k16", wgmma_kernel, 64, 128, 128);
  launches();
  if (is_hopper) clusters();
  sums_by_code(units, is_hopper);
  check(cudaDeviceSynchronize(), "a kernel");
}
