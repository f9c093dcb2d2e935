// Small kernels, right ones and faulty ones, that prove what the executor computes and what it catches.
//
//     drills NAME     prints "ok", or "wrong: N" when N results differ from what plain C++ says; faults abort with a message
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/common.cuh"
#include "testing/hopper_cpu.h"

namespace {

using namespace vq;

int report(long wrong) {
  wrong ? std::printf("wrong: %ld\n", wrong) : std::printf("ok\n");
  return 0;
}

// ---- transpose through shared memory: kBarrier = false forgets that all must have written before anyone reads ----------------

struct Tile {
  float cell[16][17];
};

template <bool kBarrier, bool kSecondBarrier>
__global__ void transpose_kernel(const float* in, float* out, int tiles) {
  VQ_SHARED(Tile, tile);
  const int i = threadIdx.x / 16, j = threadIdx.x % 16;
  for (int t = 0; t < tiles; ++t) {
    tile.cell[i][j] = in[t * 256 + threadIdx.x];
    if (kBarrier) sync_threads();
    out[t * 256 + threadIdx.x] = tile.cell[j][i];
    if (kSecondBarrier) sync_threads();
  }
}

template <bool kBarrier, bool kSecondBarrier>
int transpose() {
  const int tiles = 3;
  std::vector<float> in(tiles * 256), out(tiles * 256, NAN);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i);
  launch(transpose_kernel<kBarrier, kSecondBarrier>, dim3(1), dim3(256), 0, nullptr, (const float*)in.data(), out.data(), tiles);
  long wrong = 0;
  for (int i = 0; i < tiles * 256; ++i) wrong += out[i] != float(i / 256 * 256 + i % 16 * 16 + i / 16 % 16);
  return report(wrong);
}

// ---- block sums: kPast = 1 reads one element too many ------------------------------------------------------------------------

template <int kPast>
__global__ void sum_kernel(const float* in, int n, float* out) {
  float sum = 0;
  for (int i = int(threadIdx.x); i < n + kPast; i += int(blockDim.x)) sum += in[i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) out[0] = sum;
}

template <int kPast>
int sum() {
  const int n = 101;
  std::vector<float> in(n, 1.0f), out(1, NAN);
  launch(sum_kernel<kPast>, dim3(1), dim3(32), 0, nullptr, (const float*)in.data(), n, out.data());
  return report(out[0] != float(n));
}

// One past the end of an array inside the shared struct, whose neighbour in memory is the next array.
struct Pair {
  int first[8], second[8];
};
__global__ void shared_past_kernel(int* out, int n) {
  VQ_SHARED(Pair, pair);
  if (threadIdx.x == 0)
    for (int i = 0; i <= n; ++i) pair.first[i] = i;
  sync_threads();
  out[threadIdx.x] = pair.first[threadIdx.x % 8];
}
int shared_past() {
  std::vector<int> out(32);
  launch(shared_past_kernel, dim3(1), dim3(32), 0, nullptr, out.data(), 8);
  return report(0);
}

__global__ void dynamic_past_kernel(int n) {
  VQ_DYNAMIC_SHARED(bytes);
  for (int i = 0; i <= n; ++i) bytes[i] = 1;
}
int dynamic_past() {
  launch(dynamic_past_kernel, dim3(1), dim3(1), 100, nullptr, 100);
  return report(0);
}

// ---- divergence --------------------------------------------------------------------------------------------------------------

__global__ void divergent_barrier_kernel(int) {
  if (threadIdx.x < 40) sync_threads();
}
__global__ void two_barriers_kernel(int) {
  if (threadIdx.x < 40)
    sync_threads();
  else
    sync_threads();
}
__global__ void divergent_shuffle_kernel(float* out) {
  float value = float(threadIdx.x);
  if (threadIdx.x < 20) value = shfl_xor(kFullWarp, value, 1);
  out[threadIdx.x] = value;
}
__global__ void wrong_mask_kernel(float* out) { out[threadIdx.x] = shfl_xor(0xFFFFu, float(threadIdx.x), 1); }

template <class... P, class... A>
int only_run(void (*kernel)(P...), int threads, A... args) {
  launch(kernel, dim3(1), dim3(threads), 0, nullptr, args...);
  return report(0);
}

// ---- collectives on part of a warp, ballots, matches, atomics ----------------------------------------------------------------

__global__ void collectives_kernel(int* out, int* total) {
  const u32 lane = threadIdx.x % 32, half = lane < 16 ? 0xFFFFu : 0xFFFF0000u;
  const u32 odd = ballot(kFullWarp, lane % 2 == 1);
  const u32 same = match_any(kFullWarp, lane / 5);
  int low = -1;
  if (lane < 16) low = shfl_xor(half, int(lane), 3);
  const int above = shfl_up(kFullWarp, int(lane), 1);
  atomic_add(total, 1);
  out[threadIdx.x] = int(odd == 0xAAAAAAAAu) + 2 * int(popcount(same) == (lane < 30 ? 5 : 2)) +
                     4 * int(low == (lane < 16 ? int(lane ^ 3) : -1)) + 8 * int(above == (lane ? int(lane) - 1 : 0));
}
int collectives() {
  std::vector<int> out(64, -1);
  int total = 0;
  launch(collectives_kernel, dim3(3), dim3(64), 0, nullptr, out.data(), &total);
  long wrong = total != 192;
  for (int v : out) wrong += v != 15;
  return report(wrong);
}

// ---- asynchronous copies: kWait = false reads what has not landed ------------------------------------------------------------

struct Ring {
  alignas(16) float stage[2][32][4];
};
template <bool kWait>
__global__ void copies_kernel(const float* in, float* out, int stages) {
  VQ_SHARED(Ring, ring);
  const int lane = int(threadIdx.x);
  copy_async16(ring.stage[0][lane], in + lane * 4, 16);
  copy_commit();
  for (int s = 0; s < stages; ++s) {
    if (s + 1 < stages) copy_async16(ring.stage[(s + 1) % 2][lane], in + ((s + 1) * 32 + lane) * 4, lane == 31 ? 8 : 16);
    copy_commit();
    if (kWait) copy_wait<1>();
    sync_threads();
    for (int i = 0; i < 4; ++i) out[(s * 32 + lane) * 4 + i] = ring.stage[s % 2][31 - lane][i];
    sync_threads();
  }
  copy_wait<0>();
}
template <bool kWait>
int copies() {
  const int stages = 3, count = stages * 128;
  auto* in = static_cast<float*>(std::aligned_alloc(16, count * 4));
  std::vector<float> out(count, NAN);
  for (int i = 0; i < count; ++i) in[i] = float(i + 1);
  launch(copies_kernel<kWait>, dim3(1), dim3(32), 0, nullptr, (const float*)in, out.data(), stages);
  long wrong = 0;
  for (int i = 0; i < count; ++i) {
    const int s = i / 128, lane = 31 - i / 4 % 32, c = i % 4;
    wrong += out[i] != (s && lane == 31 && c >= 2 ? 0.0f : float(s * 128 + lane * 4 + c + 1));
  }
  std::free(in);
  return report(wrong);
}

// ---- matrix products: small integers, so that every order of summation is exact ----------------------------------------------

template <bool kBF16>
__global__ void mma_kernel(const float* a, const float* b, float* d) {
  const int lane = int(threadIdx.x), row = lane / 4, quad = lane % 4;
  auto half = [](float value) { return u32(kBF16 ? f32_to_bf16(value) : f32_to_f16(value)); };
  auto word = [&](const float* at) { return half(at[0]) | half(at[1]) << 16; };
  u32 left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = word(a + (row + 8 * (i % 2)) * 16 + i / 2 * 8 + quad * 2);
  for (int i = 0; i < 2; ++i) right[i] = word(b + row * 16 + i * 8 + quad * 2);
  float sum[4] = {1, 2, 3, 4};
  if (kBF16)
    mma_16x8x16_bf16(sum, left, right);
  else
    mma_16x8x16(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(row + 8 * (i / 2)) * 8 + quad * 2 + i % 2] = sum[i];
}
template <bool kBF16>
int mma() {
  std::vector<float> a(16 * 16), b(8 * 16), d(128, NAN);
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(int(i * 7 % 11) - 5);
  for (size_t i = 0; i < b.size(); ++i) b[i] = float(int(i * 5 % 13) - 6);
  launch(mma_kernel<kBF16>, dim3(1), dim3(32), 0, nullptr, (const float*)a.data(), (const float*)b.data(), d.data());
  long wrong = 0;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      float sum = float(1 + r / 8 * 2 + c % 2);
      for (int k = 0; k < 16; ++k) sum += a[r * 16 + k] * b[c * 16 + k];
      wrong += d[r * 8 + c] != sum;
    }
  return report(wrong);
}

// One warpgroup, two steps of 16 components; kArrive = false reads before the copy has landed, kWait = false before the product.
template <bool kArrive, bool kWait>
__global__ void wgmma_kernel(const float* a, const uint16_t* b, float* d) {
  VQ_DYNAMIC_SHARED(shared);
  auto* barrier = reinterpret_cast<u64*>(shared + 8192);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_done();
  }
  sync_threads();
  if (threadIdx.x == 0) {
    barrier_expect(barrier, 8192);
    bulk_copy(shared, b, 4096, barrier);
    bulk_copy(shared + 4096, b + 2048, 4096, barrier);
  }
  if (kArrive) barrier_wait(barrier, 0);
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32 * 16 + lane / 4;
  float acc[64];
  wgmma_fence();
  for (int step = 0; step < 2; ++step) {
    u32 left[4];
    for (int i = 0; i < 4; ++i) {
      const float* at = a + (row + 8 * (i % 2)) * 32 + step * 16 + i / 2 * 8 + lane % 4 * 2;
      left[i] = u32(f32_to_f16(at[0])) | u32(f32_to_f16(at[1])) << 16;
    }
    if (step == 0)
      wgmma_64x128x16<false>(acc, left, matrix_at(shared));
    else
      wgmma_64x128x16<true>(acc, left, matrix_at(shared + 4096));
  }
  wgmma_commit();
  if (kWait) wgmma_wait<0>(acc);
  for (int i = 0; i < 64; ++i) d[(row + 8 * (i / 2 % 2)) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i];
  wgmma_wait<0>(acc);
}
template <bool kArrive, bool kWait>
int wgmma() {
  std::vector<float> a(64 * 32), b(128 * 32), d(64 * 128, NAN);
  auto* packed = static_cast<uint16_t*>(std::aligned_alloc(16, 8192));
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(int(i * 7 % 11) - 5);
  for (size_t i = 0; i < b.size(); ++i) b[i] = float(int(i * 5 % 13) - 6);
  for (int c = 0; c < 128; ++c)  // blocks of 8 columns x 8 components, as matrix_at says
    for (int k = 0; k < 32; ++k) packed[k / 16 * 2048 + k % 16 / 8 * 1024 + c / 8 * 64 + c % 8 * 8 + k % 8] = f32_to_f16(b[c * 32 + k]);
  launch(wgmma_kernel<kArrive, kWait>, dim3(1), dim3(128), 8192 + 8, nullptr, (const float*)a.data(), (const uint16_t*)packed, d.data());
  long wrong = 0;
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < 128; ++c) {
      float sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[r * 32 + k] * b[c * 32 + k];
      wrong += d[r * 128 + c] != sum;
    }
  std::free(packed);
  return report(wrong);
}

// A barrier that nobody will ever complete.
__global__ void lost_barrier_kernel(int) {
  VQ_DYNAMIC_SHARED(shared);
  auto* barrier = reinterpret_cast<u64*>(shared);
  if (threadIdx.x == 0) barrier_init(barrier, 2);
  sync_threads();
  if (threadIdx.x == 0) barrier_arrive(barrier);
  barrier_wait(barrier, 0);
}
int lost_barrier() {
  launch(lost_barrier_kernel, dim3(1), dim3(32), 8, nullptr, 0);
  return report(0);
}

// Every float16 value survives the way to float32 and back; float32 values round to the nearest, ties to even.
int conversions() {
  long wrong = 0;
  for (u32 bits = 0; bits < 65536; ++bits) {
    const float value = f16_to_f32(uint16_t(bits)), other = bf16_to_f32(uint16_t(bits));
    if (value == value) wrong += f32_to_f16(value) != bits;
    if (other == other) wrong += f32_to_bf16(other) != bits;
  }
  const float ties[][2] = {{2049, 2048}, {2051, 2052}, {65519, 65504}, {65520, INFINITY}, {0x1p-25f, 0}, {0x1.8p-24f, 0x1p-23f},
                           {0x1.ffcp-15f, 0x1p-14f}, {0x1.ff4p-15f, 0x1.ffp-15f}, {0x1.fffp-15f, 0x1p-14f}};
  for (auto& t : ties) wrong += f16_to_f32(f32_to_f16(t[0])) != t[1];
  wrong += bf16_to_f32(f32_to_bf16(257)) != 256 || bf16_to_f32(f32_to_bf16(259)) != 260;
  return report(wrong);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  std::vector<float> out(64);
  if (name == "transpose") return transpose<true, true>();
  if (name == "missing_barrier") return transpose<false, true>();
  if (name == "missing_second_barrier") return transpose<true, false>();
  if (name == "sum") return sum<0>();
  if (name == "off_by_one") return sum<1>();
  if (name == "shared_off_by_one") return shared_past();
  if (name == "dynamic_off_by_one") return dynamic_past();
  if (name == "divergent_barrier") return only_run(divergent_barrier_kernel, 64, 0);
  if (name == "two_barriers") return only_run(two_barriers_kernel, 64, 0);
  if (name == "divergent_shuffle") return only_run(divergent_shuffle_kernel, 32, out.data());
  if (name == "wrong_mask") return only_run(wrong_mask_kernel, 32, out.data());
  if (name == "collectives") return collectives();
  if (name == "copies") return copies<true>();
  if (name == "missing_copy_wait") return copies<false>();
  if (name == "mma_f16") return mma<false>();
  if (name == "mma_bf16") return mma<true>();
  if (name == "wgmma") return wgmma<true, true>();
  if (name == "missing_copy_barrier") return wgmma<false, true>();
  if (name == "missing_wgmma_wait") return wgmma<true, false>();
  if (name == "lost_barrier") return lost_barrier();
  if (name == "conversions") return conversions();
  std::fprintf(stderr, "drills: unknown name '%s'\n", name.c_str());
  return 2;
}
