// Nearest code of every row of one group, by the cheapest road; what quantize and residual share with nearest.
#pragma once
#include <memory>

#include "codes.h"

namespace vqfast {

enum class Road : int { kAuto = 0, kDense = 1, kPanels = 2, kFew = 3, kBytes = 4 };

struct SearchReport {
  Road road = Road::kDense;
  PanelCounts counts{};
  int64_t panels_count = 0;
  int64_t searched = 0, always = 0;  // codes that the plans hold, and codes that every row tries by the exact formula
};

// Whether the pruned road is looked at for so many rows and codes: what its panels cost to prepare must be little beside the search.
bool panels_may_pay(int64_t rows, int64_t codes, int64_t dim);

// A search over one codebook; built once per call, used for any number of row sets (levels of a residual quantizer, say).
class NearestSearch {
 public:
  NearestSearch(const Codes& codes, const Rows& rows, const Hints& hints, const Parallel& parallel, Road road = Road::kAuto);
  ~NearestSearch();

  // score [count] by the contract's formula (NaN for a row that is not finite), index [count] (0 there).
  void run(const Rows& rows, const int64_t* guess, double* score, int64_t* index);
  const SearchReport& report() const { return report_; }

 private:
  PanelCounts pilot(const Rows& rows) const;
  double panels_cost(const Rows& rows, const Hints& hints, bool wanted);
  double bytes_cost(const Rows& rows, bool wanted);
  void run_dense(const Rows& rows, double* score, int64_t* index);
  void run_panels(const Rows& rows, const int64_t* guess, double* score, int64_t* index);
  struct Tiles;
  void fill(const Rows& rows, int64_t first, int64_t count, int64_t tile, Tiles* tiles) const;
  void add_row(const float* exact, bool takes_part, double square, double slack, int64_t at, Tiles* tiles) const;
  struct Block;
  void describe(const Rows& rows, int64_t from, int64_t count, Block* block, double* score, int64_t* index) const;
  void sort(int64_t count, Block* block) const;
  void settle_always(const Rows& rows, double* score, int64_t* index) const;
  void settle_alone(const float* exact, double* score, int64_t* index) const;
  void brute_force(const float* exact, double* score, int64_t* index) const;

  const Codes& codes_;
  const Parallel& parallel_;
  std::unique_ptr<DenseBuild> dense_;
  std::unique_ptr<ByteBuild> bytes_;
  std::unique_ptr<PanelBuild> panels_;
  SearchReport report_;
};

// Search of one codebook for one set of rows, by whichever road; score and index as NearestSearch::run gives them.
void search_rows(const ExactCodes& codes, int64_t codes_count, const Rows& rows, const Hints& hints, const Parallel& parallel, Road road,
                 double* score, int64_t* index, SearchReport* report);

void nearest(const View& x, const View& codebook, Metric metric, const Hints* hints_per_group, float* distance, int64_t* indices,
             const Parallel& parallel, Road road, SearchReport* report);

}  // namespace vqfast
