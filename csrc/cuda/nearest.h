// nearest on CUDA: what the launchers take. Torch-free.
#pragma once

#include "cuda/common.cuh"

namespace vq {

struct Mask {  // [B, N] bool, true = valid; data may be nullptr: all valid
  const unsigned char* data;
  i64 stride_b, stride_n;
};

// What one search needs beside its inputs and outputs; all of it lies in one block of device memory that the caller brings.
// R = B N rows per group, S = parts into which the codes are split. O((N + K) D) bytes.
struct NearestSpace {
  float* centre;             // [G, D] subtracted from both sides; any value is right, a good one makes the screen sharp
  float* codes;              // [G, code tiles, padded D, 128] centred codes (cosine: of length 1 before centring) in float32
  float* rows;               // [G, row tiles, padded D, 128] -(x - centre) (l2) or -x, in float32
  float* half_norm;          // [G, K] |code|^2 / 2, less the bound's share (l2), or 0; +inf: never a candidate of the screen
  float* length;             // [G, K] upper bound of the centred code's length
  double* code_norm;         // [G, K] cosine: sqrt(sum c^2) as the contract computes it
  unsigned char* state;      // [G, K] CodeState
  int* bucket;               // [G, buckets] lowest code of each hash: finds duplicates
  int* first_code;           // [G] lowest code that may be chosen
  int* wild_codes;           // [G] how many are kWild
  unsigned long long* open;  // [G] how many rows the screen could not settle
  float* row_length;         // [G, R] upper bound of |x - centre|; NaN: a row that is not finite; -1: masked
  float* best;               // [S, G, R] smallest lower bound of a score
  float* second;             // [S, G, R] second smallest
  int* best_code;            // [S, G, R]
  i64* open_row;             // [G, R] rows that the screen could not settle, in any order
  float* open_limit;         // [G, R] no code whose lower bound lies above this can win
  i64 buckets, padded_dim;
  int splits;
  // The float16 screen of nearest_hopper.cuh; steps == 0: not used.
  int* longest;        // [G] largest `length`, as float bits
  int* code_residual;  // [G] largest |scaled code - its float16|, as float bits
  u32* code_halves;    // [G, code tiles, steps, 2, 128, 8] float16, as wgmma reads it
  u32* row_halves;     // [G, row blocks of 64, steps, 128 threads, 4] pairs of float16, as wgmma's registers hold them
  float* row_error;    // [G, R] bound of the scaled score's error; inf: the row is not screened
  float* row_bias;     // [G, R] what was added to keep scaled scores positive
  float* row_scale;    // [G, R] from scaled scores back to scores
  int* entries;        // [H, G, R, 4 lanes, 2 chains, 2] smallest and second smallest packed group minimum, H = half_splits
  int steps, half_splits, id_bits;
};

// The screen takes tiles of 128 rows and 128 codes, 8 components at a time; both are stored tile by tile, component by component,
// so that a tile is one contiguous block. Padding components are zero.
constexpr int kTile = 128, kTileDims = 8;

struct NearestProblem {
  Rows x;
  Codes codebook;
  Mask mask;
  int metric;
  float* distance;  // [B, G, N] contiguous
  i64* indices;     // [B, G, N] contiguous; -1 where masked
};

// Bytes that `nearest` needs.
size_t nearest_space(const NearestProblem& problem);
void nearest(const NearestProblem& problem, void* memory, cudaStream_t stream);

// Lays out what every search needs but that for few rows (nearest_few.h); returns its bytes.
size_t nearest_layout(const NearestProblem& problem, void* memory, NearestSpace* space);

// nearest_hopper.cu: sets steps, half_splits and id_bits (steps = 0 where the device or D do not allow it), and runs the screen.
void plan_hopper(const NearestProblem& problem, NearestSpace* space);
void screen_on_hopper(const NearestProblem& problem, double e0, const NearestSpace& space, cudaStream_t stream);

}  // namespace vq
