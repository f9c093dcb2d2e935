// Nearest-code search on the CPU: what the driver (nearest.cpp) hands to the kernels of one SIMD level (search_impl.h).
// Torch-free: raw pointers in, raw pointers out. docs/SEARCH.md proves the bounds that are used here.
#pragma once
#include <stdint.h>

namespace vqfast {

constexpr int kPanel = 32;       // codes per panel: two AVX-512 vectors
constexpr int kPanelGroup = 16;  // panels whose boxes are tested together: one AVX-512 vector
constexpr int kMaxBasis = 8;     // principal directions at most; one more coordinate holds the norm of the rest
constexpr int kMaxPanelDim = 2048;  // dimensions that the pruned road takes
constexpr int kCandidates = 64;  // candidates that a row collects before they are settled by the exact formula

enum Metric : int { kL2 = 0, kCosine = 1, kDot = 2 };

// The codes as given, for the contract's formula. score(x, c) is what nearest minimises.
struct ExactCodes {
  const float* codes;      // [K, ld], the values as given (float16 and bfloat16 widened exactly)
  int64_t ld;
  int64_t dim;
  const double* norm;      // [K] sum c_d^2 in the contract's arithmetic; cosine only, else null
  Metric metric;
};

// One row on its way through the search.
struct Row {
  const float* exact;      // [D] as given
  double best;             // best score so far by the contract's formula; +inf before
  int64_t index;           // its code; -1 before
  float slack;             // dense road: rounding allowance of this row
  int count;
  int32_t candidate[kCandidates];  // codes (original index)
  float score[kCandidates];        // their screened score (lower bound up to the row's slack)
};

// All codes in panels, every coordinate: the dense road.
struct DensePlan {
  const float* panels;     // [P, dim, 32] centred and scaled codes
  const float* start;      // [P, 32] |c|^2 / 2 less the code's rounding allowance; +inf for padding
  const float* slack;      // [P, 32] twice that allowance
  const int32_t* id;       // [P, 32] original index
  int64_t panels_count;
  int64_t dim;
};

// Codes in panels by a k-d order of their principal coordinates: the pruned road.
struct PanelPlan {
  const float* panels;     // [P, width, 32] principal coordinates and the norm of the rest
  const float* start;      // [P, 32] |c|^2 / 2 less the allowance; +inf for padding
  const int32_t* id;       // [P, 32] original index
  const float* low;        // [P16, width, 16] boxes of the panels, P16 groups of 16
  const float* high;
  const float* allowance;  // [P16, 16] rounding allowance of each panel, in squared distance
  const float* group_low;  // [Q16, width, 16] boxes of the groups
  const float* group_high;
  const float* group_allowance;  // [Q16, 16]
  int64_t panels_count, groups_count;
  int width;               // basis + 1
  const float* codes;      // [K, ld] what full evaluation subtracts (as given; unit vectors for cosine and dot)
  int64_t ld;
  int64_t dim;
  float screen_rel;        // screened score may err by screen_rel * (|x|^2 + |c|^2)
  float full_rel;          // full distance may err by this factor ...
  float radius;            // ... and by this absolute distance (unit vectors only)
  float tiny;              // absolute slack for underflow
};

struct PanelCounts {       // what a search did; for the choice of road, tests and reports
  int64_t rows, groups, panels, evaluations, candidates;
};

struct PanelQuery {        // per row, filled by project()
  float coordinate[kMaxBasis + 1];
  float norm;              // |x - centre|^2
};

// The functions of one SIMD level.
struct Kernels {
  int lanes;               // of a vector
  int rows_per_tile;
  float ops_per_term;      // roundings per term of a sum: 1 with FMA, 2 without

  // [tiles * rows_per_tile] rows against all panels. tiles is [tile][dim][rows_per_tile]; a score under a row's limit makes a
  // candidate, and lowers it.
  void (*dense)(const DensePlan&, const ExactCodes&, const float* tiles, int64_t tile_count, float* limits, Row* rows);
  // Evaluate what the rows collected by the contract's formula, and forget it.
  void (*settle)(const ExactCodes&, Row*, int row_count);
  // Pruned search of rows order[0..n): index and exact score of each.
  void (*panels)(const PanelPlan&, const ExactCodes&, const float* exact_rows, int64_t exact_ld, const float* rows, int64_t ld,
                 const PanelQuery* queries, const int32_t* order, const int32_t* first_panel, const int64_t* guess, int64_t n,
                 double* score, int64_t* index, PanelCounts* counts);
  // Coordinates of n rows along `count` directions (4 or 8), which lie side by side: [dim / 2 rounded up, 2 * count rounded up to
  // whole vectors] in the order (direction, dimension even or odd). rest_rel widens the norm of the rest.
  void (*project)(const float* const* rows, int n, const float* centre, const float* directions, int count, int64_t dim,
                  float rest_rel, PanelQuery* const* out);
  // y[j] = sum_d basis[j, d] (row_d - centre_d); and out[j, d] += y[j] (row_d - centre_d)
  void (*apply_covariance)(const float* row, const float* centre, const float* basis, int directions, int64_t dim, float* out);
  // hash of the values of a row (equal values, equal hash); norm of (row - centre) in float; finite or not
  uint64_t (*inspect)(const float* row, int64_t dim, bool* finite);
  double (*centred_norm)(const float* row, const float* centre, int64_t dim);
  // total[d] += row[d]
  void (*accumulate)(double* total, const float* row, int64_t dim);
};

const Kernels& kernels();          // of the level in use
int level_supported();             // 0 scalar, 1 avx2, 2 avx512
int level();
void set_level(int level);

const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

}  // namespace vqfast
