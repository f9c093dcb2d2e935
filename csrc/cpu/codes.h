// A codebook of one group, prepared for search: usable codes, their exact norms, a centre, and the two plans.
#pragma once
#include <memory>
#include <vector>

#include "search.h"
#include "view.h"

namespace vqfast {

// What a caller remembers between calls; may cost time, never a code.
struct Hints {
  const int64_t* order = nullptr;  // [K] a permutation: panel order of a codebook much like this one
  const float* basis = nullptr;    // [directions, D] its principal directions
  int64_t directions = 0;
  const int64_t* guess = nullptr;  // [rows] likely code of each row
};

// A row with |x - centre|^2 over kWildSquare is searched by the exact formula alone. For every other row a code with
// |c - centre|^2 over kFarSquare is farther than the typical code, whose square is under 2^30, so the plans leave it out.
constexpr double kWildSquare = 0x1p60;
constexpr double kFarSquare = 0x1p100;

// A binary tree over panels by which a row finds the panel it falls into. Leaves lead to themselves, so that every descent has
// `depth` steps and no branch.
struct PanelTree {
  struct Node {
    int32_t child[2];
    int32_t split;          // child[0] where the coordinate is under it
    int32_t coordinate;
    int32_t panel;          // of a leaf
  };
  std::vector<Node> nodes;
  int depth = 0;

  // Of n points; kTogether of them descend side by side, each step of all before the next.
  void panels_of(const PanelQuery* points, int64_t n, int32_t* panel) const {
    constexpr int kTogether = 8;
    for (int64_t first = 0; first < n; first += kTogether) {
      const PanelQuery* point[kTogether];
      for (int r = 0; r < kTogether; ++r) point[r] = points + (first + r < n ? first + r : n - 1);
      int32_t at[kTogether] = {};
      for (int i = 0; i < depth; ++i) {
#pragma GCC unroll 8
        for (int r = 0; r < kTogether; ++r) {
          const Node& node = nodes[at[r]];
          at[r] = node.child[point[r]->grid[node.coordinate] >= node.split];
        }
      }
      for (int r = 0; r < kTogether && first + r < n; ++r) panel[first + r] = nodes[at[r]].panel;
    }
  }
};

// Sums in four parts, which do not wait for one another; not the order of the contract.
template <class T>
double product_of(const T* a, const T* b, int64_t dim) {
  double part[4] = {};
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4)
    for (int j = 0; j < 4; ++j) part[j] += (double)a[d + j] * b[d + j];
  for (; d < dim; ++d) part[0] += (double)a[d] * b[d];
  return (part[0] + part[1]) + (part[2] + part[3]);
}
inline double square_of(const float* row, int64_t dim) { return product_of(row, row, dim); }

// A point that few outliers do not move: coordinate by coordinate the median of three medians of three rows.
constexpr int kCentreRows = 9;
void centre_of(const float* const (&rows)[kCentreRows], int64_t dim, float* out);

class Codes {
 public:
  // given: what stays where it is while this stands; its norms are found here.
  Codes(const ExactCodes& given, int64_t count, const Parallel& parallel);

  const ExactCodes& exact() const { return exact_; }
  Metric metric() const { return exact_.metric; }
  int64_t dim() const { return exact_.dim; }
  // Finite codes, equal ones represented by the lowest index, ascending.
  const std::vector<int32_t>& usable() const { return usable_; }
  // Codes that every row has to try by the exact formula (their unit vector does not exist, or they are out of scale).
  const std::vector<int32_t>& always() const { return always_; }
  // Lowest equal code that has a vector in the plans, or -1.
  int32_t representative(int64_t code) const { return code >= 0 && code < (int64_t)equal_.size() ? equal_[code] : -1; }
  bool unit_vectors() const { return exact_.metric != kL2; }

  // Vectors that the plans search in squared distance: codes as given (l2, scaled by a power of two when their size asks for
  // it), or unit vectors (cosine, and dot with one more coordinate).
  const Rows& work() const { return work_; }
  float scale() const { return scale_; }
  const std::vector<int32_t>& searched() const { return searched_; }  // usable without always
  const std::vector<float>& centre() const { return centre_; }
  double typical_square() const { return typical_square_; }  // |code - centre|^2 that 3/4 of the codes stay under

 private:
  void find_usable(const Parallel&);
  void make_unit(const Parallel&);
  void find_centre();
  void rescale(const Parallel&);

  Rows given_;
  Rows work_;
  ExactCodes exact_;
  std::vector<double> norm_;
  std::vector<int32_t> usable_, always_, searched_, equal_;
  std::vector<float> centre_;
  float scale_ = 1.0f;
  double largest_norm_ = 0, typical_square_ = 0;
};

// Everything in panels, all coordinates.
struct DenseBuild {
  DenseBuild(const Codes&, double row_square, const Parallel&);
  DensePlan plan;
  double error, balance;        // a row's allowance is error * balance * |x|^2 / 2 (+ tiny)
  AlignedFloats storage;
  std::vector<int32_t> id;
};

// The same in bytes, each code in steps of its own.
struct ByteBuild {
  ByteBuild(const Codes&, const Parallel&);
  BytePlan plan = {};
  double largest = 0;           // |c| at most
  bool worth_it = false;        // false: the codes differ too much in size, or there is only one; nothing else was built

 private:
  AlignedInts storage_;
  AlignedFloats floats_;
  std::vector<int32_t> id_;
};

// Completes a row that to_bytes left; returns what its scores may be off by beside its and the codes' errors.
double in_steps(const ByteBuild&, ByteRow*);

// Principal coordinates in k-d ordered panels with boxes.
struct PanelBuild {
  PanelBuild(const Codes&, const Hints&, const Parallel&);
  const float* basis() const { return basis_.get(); }  // [directions, dim]; null: too many dimensions
  // More where a full distance costs much, which a longer screen then saves.
  static int directions_of(int64_t dim) { return dim < 4 ? 3 : dim < 128 ? 9 : kMaxCoordinates - 1; }
  PanelPlan plan = {};
  PanelTree tree;
  double captured = 0;          // share of the variance in the principal directions
  bool worth_it = false;        // false: the data has no principal directions, nothing else was built
  // Cell of each of n rows: its panel, then `bits` binary digits of each of the three widest coordinates of that panel's box.
  void cells_of(const PanelQuery* rows, const int32_t* panel, int64_t n, int bits, int32_t* cell) const;
  std::vector<int32_t> order;   // searched codes within reach, in panel order

 private:
  std::vector<const float*> sample_codes(const Codes&, double* total);  // of their squares
  void find_basis(const Codes&, const std::vector<const float*>& sample, double total, const Hints&, const Parallel&);
  void find_allowances(const Codes&);
  void project_codes(const Codes&, const Parallel&);
  void find_order(const Codes&, const Hints&, const Parallel&);
  bool take_order(const Codes&, const int64_t* given);
  void fill_panels(const Codes&, const Parallel&);

  struct Grid {
    int16_t low[3];
    int8_t coordinate[3] = {0, 0, 0};
    float per_unit[3];
  };
  void find_grid(int64_t panel, const int16_t* low, const int16_t* high);

  AlignedFloats basis_;         // [directions, dim], the centre, and the directions as the plan has them
  std::vector<Grid> grids_;
  std::unique_ptr<PanelQuery[]> points_;  // of the searched codes
  AlignedInts storage_;
  std::vector<int32_t> id_;
};

}  // namespace vqfast
