// The incremental sampler of the autoregressive priors: a small machine that runs a network, given as a program, over a map of codes,
// one position after the other, each computed once. Torch-free: raw pointers in, raw pointers out.
//
//   row phase     once per row i      everything that depends on rows above i only, for all columns at once (small GEMMs)
//   pixel phase   once per position   the rest of the network for a range of columns [c0, c1) of row i, usually one (GEMVs)
//
// Canonical arithmetic (docs/PRIORS.md): each output of a convolution is one float32 chain of fused multiply-adds, started at its bias
// and continued over (tap, channel) ascending, so its bits depend on no tile, batch, thread count or SIMD level.
#pragma once
#include <cstdint>

namespace vqfast {

constexpr int64_t kSampleVersion = 1;
constexpr int64_t kWeightPanel = 64;   // outputs per packed weight panel: 4 AVX-512 accumulators hide the FMA's latency
constexpr int64_t kHalf = 32;          // a gated panel holds 32 outputs a and the 32 outputs b that gate them
constexpr int64_t kRowChunk = 96;      // rows of accumulators between weight re-reads: 24 KB beside a 32 KB weight block
constexpr int64_t kWeightBlock = 128;  // channels per weight block: 128 * 64 * 4 = 32 KB stays in L1 while the rows pass

enum SampleMode : int64_t { kDraw = 0, kScore = 1 };

// One SIMD level. All take unaligned pointers and give the same bits at every level.
struct SampleKernels {
  // acc[m][o] = fma(a[m * lda + c], w[c * 64 + o], acc[m][o]) for c ascending; acc is [rows, 64].
  void (*chain)(float* acc, const float* a, int64_t lda, int64_t rows, const float* w, int64_t channels);
  void (*gate)(float* out, const float* a, const float* b, int64_t n);  // tanh(a) * sigmoid(b)
  void (*glu)(float* out, const float* a, const float* b, int64_t n);   // a * sigmoid(b)
  void (*elu)(float* out, const float* a, int64_t n);                   // a > 0 ? a : exp(a) - 1
  // scores[t] = scale * chain over c of q[c] * keys[c * ldk + t]; count is rounded up to 16.
  void (*scores)(float* scores, const float* q, const float* keys, int64_t ldk, int64_t channels, int64_t count, float scale);
  // scores[t] = exp(scores[t] - top) for t < count (0 up to the next multiple of 16); returns their sum: 16 lanes, then a fixed tree.
  float (*softmax)(float* scores, float top, int64_t count);
  // out[c] = (chain over t of weights[t] * values[t * ldv + c]) / sum; channels is a multiple of 16.
  void (*mix)(float* out, const float* weights, const float* values, int64_t ldv, int64_t channels, int64_t count, float sum);
};

const SampleKernels& sample_kernels_scalar();
const SampleKernels& sample_kernels_avx2();
const SampleKernels& sample_kernels_avx512();

struct SampleArgs {
  const int64_t* program;    // see vqfast/ops/sample.py for the layout
  int64_t program_size;
  const float* weights;
  int64_t weights_size;
  float* workspace;          // sample_workspace() floats; holds all state between calls
  int64_t workspace_size;
  int64_t* tokens;           // [batch, height, width]; -1 where not known yet
  const uint8_t* given;      // [batch, height, width] or null; nonzero: the token is kept
  const float* condition;    // [batch, height, width, condition_channels] or null
  const int64_t* labels;     // [batch] or null; -1: no class
  float* logits;             // [batch, height, width, codebook_size] or null
  double* log_prob;          // [batch, height, width] or null; of the token under the untempered model
  int64_t batch, height, width;
  int64_t start, stop;       // positions, raster order
  int64_t mode, lookahead;
  int64_t seed, first_image;
  double temperature, top_p;
  int64_t top_k;
  int threads;
};

// Floats of workspace that the program needs; throws std::invalid_argument when the program is malformed.
int64_t sample_workspace(const SampleArgs& args);
// Runs positions [start, stop); returns how many positions the network was evaluated for.
int64_t sample_run(const SampleArgs& args, const SampleKernels& kernels);

// ---- sample_draw.cpp: float64 arithmetic without contraction, the same everywhere ----
struct DrawSettings {
  int64_t codebook_size, seed;
  double temperature, top_p;
  int64_t top_k;
};
// The token of (seed, image, position): argmax of logit / temperature + Gumbel noise over the codes that top-k and top-p keep.
// scratch holds draw_scratch() values, order codebook_size.
int64_t draw_token(const float* logits, const DrawSettings& settings, int64_t image, int64_t position, double* scratch, int64_t* order);
double token_log_prob(const float* logits, int64_t codebook_size, int64_t token);
inline int64_t draw_scratch(int64_t codebook_size) { return 4 * codebook_size; }

}  // namespace vqfast
