// Nearest-code search on the CPU: what the driver (nearest.cpp) hands to the kernels of one SIMD level (search_impl.h).
// Torch-free: raw pointers in, raw pointers out. docs/SEARCH.md proves the bounds that are used here.
#pragma once
#include <stdint.h>

namespace vqfast {

constexpr int kPanel = 32;       // codes per panel: two AVX-512 vectors
constexpr int kPanelGroup = 16;  // panels whose boxes are tested together: one AVX-512 vector
constexpr int kFirstPanels = 4;  // that follow one another in the tree, in which a row's first bound is looked for
constexpr int kMaxCoordinates = 12;   // coordinates of a point: principal ones, and the norm of the rest
constexpr int kProjected = 64;    // dimensions that a coordinate is summed over in one go, a multiple of every vector
constexpr int kGrid = 16380;     // points lie this many steps from the origin at most: the difference of two coordinates is an int16
constexpr int kLeastByteDim = 11;  // with fewer dimensions, bounding a code costs the byte search more than its products save
constexpr int kMostTileRows = 16;  // rows of a tile of any level, and lanes of a vector
constexpr int kMaxPanelDim = 2048;  // dimensions that the pruned road takes
constexpr int kCandidates = 64;  // candidates that a row collects before they are settled by the exact formula

enum Metric : int { kL2 = 0, kCosine = 1, kDot = 2 };

// The codes as given, for the contract's formula. score(x, c) is what nearest minimises.
struct ExactCodes {
  const float* codes;      // [K, ld], the values as given (float16 and bfloat16 widened exactly)
  int64_t ld;
  int64_t dim;
  const double* norm;      // [K] sum c_d^2 in the contract's arithmetic; cosine only; null: computed where it is needed
  Metric metric;
};

// One row on its way through the search.
struct Row {
  const float* exact;      // [D] as given
  double best;             // best score so far by the contract's formula; +inf before
  int64_t index;           // its code; INT64_MAX before
  float slack;             // dense road: rounding allowance of this row
  int count;
  int32_t candidate[kCandidates];  // codes (original index)
  float score[kCandidates];        // their screened score (lower bound up to the row's slack)
};

// A search that reads codes where they lie: the road of few rows.
struct FewPlan {
  const float* shift;      // [dim] what is added to every code: minus a centre
  int64_t count;           // codes
  float half;              // a code's score starts at |c'|^2 (half - of_code): 1/2 for l2, else 0
  float of_code;           // rounding allowance of a code, by |c'|^2
  bool unit;               // codes are divided by their norms (cosine)
  bool direct;             // rows lie [n, dim]; else in tiles [dim, rows_per_tile], the last of one to three times narrow_tile rows
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

// All codes in panels, every coordinate rounded to a byte: the dense road of levels that multiply bytes.
struct BytePlan {
  const int32_t* panels;   // [P, quads, 32] four coordinates a word: centred codes in steps of their unit, plus 128
  const float* start;      // [P, 32] |c|^2 / 2; +inf for padding
  const float* unit;       // [P, 32] a step of a code
  const float* length;     // [P, 32] |c|
  const float* error;      // [P, 32] distance of the steps from the code
  const int32_t* id;       // [P, 32] original index
  int64_t panels_count;
  int64_t quads;           // dim in fours, rounded up
};

struct ByteRow {           // a row in steps
  float unit;
  int32_t sum;             // of the steps
  float length, error;     // |the steps|, and their distance from the row
};

// Codes in panels by a k-d order of their principal coordinates: the pruned road. Coordinates are integers in units of a grid, no point
// more than kGrid from the origin, in pairs of int16 that share an int32.
struct PanelPlan {
  const int32_t* panels;   // [P, pairs, 32] negated coordinates: principal ones and the norm of the rest
  const int32_t* start;    // [P, 32] half their square, rounded down; INT32_MAX for padding
  const int32_t* id;       // [P, 32] original index
  const int32_t* low;      // [P16, pairs, 16] boxes of the panels, P16 groups of 16
  const int32_t* high;
  const int32_t* group_low;  // [Q16, pairs, 16] boxes of the groups
  const int32_t* group_high;
  int64_t panels_count, groups_count;
  int coordinates;         // of a point: 4, 10 or 12
  const float* centre;     // [dim]
  const float* basis;      // [dim, coordinates - 1]
  const float* codes;      // [K, ld] what full evaluation subtracts (as given; unit vectors for cosine and dot)
  int64_t ld;
  int64_t dim;
  float per_unit;          // grid steps per unit of a coordinate
  float rest_rel;          // widens the norm of the rest
  float rounding;          // grid steps by which the distance of two rounded points may exceed that of the points themselves
  float row_rel, code_rel;  // a squared distance of coordinates may exceed the true one by row_rel |x|^2 + code_rel |c|^2 + excess
  float full_rel;          // full distance may err by this factor ...
  float radius;            // ... and by this absolute distance (unit vectors only)
  float tiny;              // absolute slack for underflow
};

struct PanelCounts {       // what a search did; for the choice of road, tests and reports
  int64_t rows, groups, panels, evaluations, candidates;
};

struct alignas(32) PanelQuery {  // a row or a code as project() gives it
  int16_t grid[kMaxCoordinates];  // principal coordinates and the norm of the rest, then 0
  float norm;              // |x - centre|^2
  float excess;            // what the coordinates' squares exceed it by, 0 at least
};

// The functions of one SIMD level.
struct Kernels {
  int lanes;               // of a vector
  int rows_per_tile;
  int narrow_tile;
  float ops_per_term;      // roundings per term of a sum: 1 with FMA, 2 without
  float pair_cost;         // of a pair of coordinates of 16 codes on the pruned road, in the dense road's operations on 16 codes; measured

  // [tiles * rows_per_tile] rows against all panels. tiles is [tile][dim][rows_per_tile]; a score under a row's limit makes a
  // candidate, and lowers it.
  void (*dense)(const DensePlan&, const ExactCodes&, const float* tiles, int64_t tile_count, float* limits, Row* rows);
  // The same with rows and codes in bytes; null at levels that do not multiply them. tiles is [tile][quads][rows_per_tile], steps one of
  // each of its rows. Returns candidates settled.
  int64_t (*bytes)(const BytePlan&, const ExactCodes&, const int32_t* tiles, const ByteRow* steps, int64_t tile_count, float* limits,
                   Row* rows);
  // rows_per_tile rows less the centre as a tile [dim, rows_per_tile], behind which `lanes` values may be overwritten; |row - centre|^2 of
  // each.
  void (*to_tile)(const float* const* rows, const float* centre, int64_t dim, float* tile, float* square);
  // row - centre in steps; word i, four of them, goes to out[i * stride]. length is |row - centre|^2, error squared too.
  ByteRow (*to_bytes)(const float* row, const float* centre, int64_t dim, int32_t* out, int64_t stride);
  // Rows against the codes begin..end - 1, begin a multiple of kPanel; a row with limit -inf takes no part, the others hold +inf or
  // more than any score. scratch [max(dim, n), kPanel]. Returns candidates settled, or -1: too many codes are as near as rounding can tell.
  int64_t (*few)(const FewPlan&, const ExactCodes&, int64_t begin, int64_t end, const float* tiles, int64_t n, float* limits, Row* rows,
                 float* scratch);
  // Evaluate what the rows collected by the contract's formula, and forget it.
  void (*settle)(const ExactCodes&, Row*, int row_count);
  // Pruned search of rows order[0..n): index and exact score of each.
  void (*panels)(const PanelPlan&, const ExactCodes&, const float* exact_rows, int64_t exact_ld, const float* rows, int64_t ld,
                 const PanelQuery* queries, const int32_t* order, const int32_t* first_panel, const int64_t* guess, int64_t n,
                 double* score, int64_t* index, PanelCounts* counts);
  // The points of n rows, by the plan's basis and grid.
  void (*project)(const PanelPlan&, const float* rows, int64_t ld, int64_t n, PanelQuery* out);
  // For each of n rows: y[j] = sum_d basis[j, d] (row_d - centre_d), and out[j, d] += y[j] (row_d - centre_d). directions is a multiple
  // of four.
  void (*apply_covariance)(const float* const* rows, int64_t n, const float* centre, const float* basis, int directions, int64_t dim,
                           float* out);
  // hash of the values of a row (equal values, equal hash), and whether they are finite; |row - centre|^2
  uint64_t (*inspect)(const float* row, int64_t dim, bool* finite);
  double (*centred_norm)(const float* row, const float* centre, int64_t dim);
  // total[d] += row[d]
  void (*accumulate)(double* total, const float* row, int64_t dim);
};

const Kernels& kernels();          // of the level in use
int level_supported();             // 0 scalar, 1 avx2, 2 avx512, 3 avx512vnni
int level();
void set_level(int level);

const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512vnni();

}  // namespace vqfast
