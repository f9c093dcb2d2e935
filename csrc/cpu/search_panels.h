// The pruned road of one SIMD level; included by search_impl.h.
//
// Rows are searched kBatchRows at a time, in steps: a first bound for each row from its home panel, boxes that say which panels to
// visit, principal coordinates that say which of their codes survive, distances in float32 of those, and the contract's formula
// for what is then still in reach. Each step is taken for many rows before the next, because a branch that waits for a step's
// result would stop the processor from overlapping the rows.

constexpr int kBatchRows = 32;
constexpr int kPairs = 4;       // distances that are computed side by side
constexpr int kChunk = 16;      // panels that are screened before their survivors are listed
constexpr int kEnough = 64;     // survivors that are evaluated together

inline void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

struct Survivor {
  int32_t row, code;
  float score;
};

// kNear rows make a tile: they lie close together and visit the same panels.
template <int kWidth, int kNear>
struct Batch {
  static constexpr int kTiles = kBatchRows / kNear;
  const PanelPlan* plan;
  const ExactCodes* exact;
  int rows;
  int32_t home[kTiles];                // the panel that a row of the tile falls into
  float q[kTiles][kWidth * kNear];     // coordinates [kWidth, kNear] of each tile
  float screen_limit[kBatchRows];      // a screened score under it survives
  float box_limit[kBatchRows];         // a box nearer than it is visited
  float upper[kBatchRows];             // upper bound of the smallest squared distance
  float norm[kBatchRows], slack[kBatchRows], excess[kBatchRows];  // of each row, in squared distance
  int32_t first[kBatchRows];           // code that was evaluated before the panels; -1: none
  const float* x[kBatchRows];          // what distances subtract codes from
  Row row[kBatchRows];
  Survivor survivor[kEnough + kChunk * kNear * kPanel];
  int survivors;
  PanelCounts counts;
};

template <int kWidth, int kNear>
inline void set_limits(Batch<kWidth, kNear>& b, int r) {
  b.screen_limit[r] = 0.5f * (b.upper[r] - b.norm[r]) + b.slack[r];
  // 64 roundings of the box distance at most.
  b.box_limit[r] = (b.upper[r] + b.excess[r] + b.slack[r]) * (1.0f + 64.0f * 6e-8f);
}

inline float with_slack(const PanelPlan& plan, float upper) { return upper * (1.0f + 2e-7f) + plan.tiny; }

// ---- distances ---------------------------------------------------------------------------------------------------------------

// Squared distances of kPairs pairs.
inline void full_distances(const float* const* x, const float* const* c, int64_t dim, float* out) {
  V total[kPairs];
#pragma GCC unroll 4
  for (int j = 0; j < kPairs; ++j) total[j] = set(0);
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      const V t = sub(load(x[j] + d), load(c[j] + d));
      total[j] = fma(t, t, total[j]);
    }
  }
  if (d < dim) {
    const int n = (int)(dim - d);
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      const V t = sub(load_part(x[j] + d, n), load_part(c[j] + d, n));
      total[j] = fma(t, t, total[j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kPairs; ++j) out[j] = sum(total[j]);
}

// Lower and upper bound of the true squared distance where float32 gives `square`.
inline void full_bounds(const PanelPlan& plan, float square, float* low, float* high) {
  if (plan.radius == 0.0f) {
    *low = square * (1.0f - plan.full_rel) - plan.tiny;
    *high = square * (1.0f + plan.full_rel) + plan.tiny;
    return;
  }
  const float root = __builtin_sqrtf(square);
  const float inner = root * (1.0f - plan.full_rel) - plan.radius;
  const float outer = root * (1.0f + plan.full_rel) + plan.radius;
  *low = inner > 0 ? inner * inner : 0.0f;
  *high = outer * outer;
}

// Up to kPairs codes, of the rows named: candidates unless their lower bound is over the best upper bound.
template <int kWidth, int kNear>
inline void evaluate(Batch<kWidth, kNear>& b, const int32_t* row, const int32_t* code, int n) {
  const PanelPlan& plan = *b.plan;
  const float *x[kPairs], *c[kPairs];
  float square[kPairs], low[kPairs], high[kPairs];
#pragma GCC unroll 4
  for (int j = 0; j < kPairs; ++j) {
    const int i = j < n ? j : 0;
    x[j] = b.x[row[i]];
    c[j] = plan.codes + (int64_t)code[i] * plan.ld;
  }
  full_distances(x, c, plan.dim, square);
  b.counts.evaluations += n;
  bool any = false;
#pragma GCC unroll 4
  for (int j = 0; j < kPairs; ++j) {
    full_bounds(plan, square[j], &low[j], &high[j]);
    any |= low[j] <= b.upper[row[j < n ? j : 0]];
  }
  if (!any) return;
  for (int j = 0; j < n; ++j) {
    const int r = row[j];
    if (!(low[j] <= b.upper[r])) continue;
    if (high[j] < b.upper[r]) {
      b.upper[r] = high[j];
      set_limits(b, r);
    }
    append(*b.exact, &b.row[r], code[j], low[j], with_slack(plan, b.upper[r]));
  }
}

// Evaluates the survivors in the order they came; a better bound rules out some that still wait.
template <int kWidth, int kNear>
__attribute__((noinline)) void evaluate_survivors(Batch<kWidth, kNear>& b) {
  for (int i = 0; i < b.survivors;) {
    int32_t row[kPairs], code[kPairs];
    int n = 0;
    for (; i < b.survivors && n < kPairs; ++i) {
      const Survivor& s = b.survivor[i];
      row[n] = s.row;
      code[n] = s.code;
      n += s.score < b.screen_limit[s.row];
    }
    if (n) evaluate(b, row, code, n);
  }
  b.survivors = 0;
}

// ---- first bounds ------------------------------------------------------------------------------------------------------------

template <int kWidth, int kNear>
inline void start_row(Batch<kWidth, kNear>& b, int r, const float* exact, const float* x, const PanelQuery& query) {
  float square = 0;
  for (int j = 0; j < kWidth; ++j) {
    b.q[r / kNear][j * kNear + r % kNear] = query.coordinate[j];
    square += query.coordinate[j] * query.coordinate[j];
  }
  b.norm[r] = query.norm;
  b.slack[r] = b.plan->screen_rel * query.norm + b.plan->tiny;
  b.excess[r] = square > query.norm ? square - query.norm : 0.0f;
  b.upper[r] = __builtin_huge_valf();
  b.first[r] = -1;
  b.x[r] = x;
  b.row[r].exact = exact;
  b.row[r].best = __builtin_inf();
  b.row[r].index = INT64_MAX;
  b.row[r].count = 0;
  set_limits(b, r);
}

// A place without a row: it visits nothing and collects nothing.
template <int kWidth, int kNear>
inline void start_empty(Batch<kWidth, kNear>& b, int r) {
  for (int j = 0; j < kWidth; ++j) b.q[r / kNear][j * kNear + r % kNear] = 0.0f;
  b.screen_limit[r] = b.box_limit[r] = -__builtin_huge_valf();
  b.row[r].count = 0;
}

// The most promising code of one panel for every row of a tile.
template <int kWidth, int kNear>
inline void choose_first(Batch<kWidth, kNear>& b, int tile, int64_t panel) {
  const PanelPlan& plan = *b.plan;
  float best[kNear];
  for (int r = 0; r < kNear; ++r) best[r] = __builtin_huge_valf();
  for (int u = 0; u < kPanel; u += kUnit) {
    V a[kNear], c[kNear];
    score_unit(plan.panels + panel * kWidth * kPanel + u, plan.start + panel * kPanel + u, b.q[tile], kWidth, a, c);
#pragma GCC unroll 8
    for (int r = 0; r < kNear; ++r) {
      const float least = smallest(min(a[r], c[r]));
      const uint32_t lanes = equal(a[r], set(least)) | (equal(c[r], set(least)) << W);
      if (kUnit < kPanel && !(least < best[r])) continue;
      best[r] = least;
      b.first[tile * kNear + r] = plan.id[panel * kPanel + u + __builtin_ctz(lanes)];
    }
  }
}

// Evaluates the first code of every row that has one.
template <int kWidth, int kNear>
inline void evaluate_first(Batch<kWidth, kNear>& b) {
  int32_t row[kPairs], code[kPairs];
  int n = 0;
  for (int r = 0; r < b.rows; ++r) {
    row[n] = r;
    code[n] = b.first[r];
    n += b.first[r] >= 0;
    if (n < kPairs && r + 1 < b.rows) continue;
    if (n) evaluate(b, row, code, n);
    n = 0;
  }
}

// ---- panels ------------------------------------------------------------------------------------------------------------------

// Which of 16 boxes lie nearer to some row of the tile than that row's limit.
template <int kWidth, int kNear>
inline uint32_t near_boxes(const float* low, const float* high, const float* allowance, const Batch<kWidth, kNear>& b, int tile) {
  uint32_t near = 0;
  for (int u = 0; u < kPanelGroup; u += W) {
    V acc[kNear];
    const V start = sub(set(0), load(allowance + u));
#pragma GCC unroll 8
    for (int r = 0; r < kNear; ++r) acc[r] = start;
    for (int j = 0; j < kWidth; ++j) {
      const V lo = load(low + j * kPanelGroup + u), hi = load(high + j * kPanelGroup + u);
#pragma GCC unroll 8
      for (int r = 0; r < kNear; ++r) {
        const V q = set(b.q[tile][j * kNear + r]);
        const V out = max(max(sub(lo, q), sub(q, hi)), set(0));
        acc[r] = fma(out, out, acc[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kNear; ++r) near |= less(acc[r], set(b.box_limit[tile * kNear + r])) << u;
  }
  return near;
}

// Panels on their way through the screen: all scores, and which codes are under the rows' limits.
template <int kNear>
struct Screened {
  float score[kChunk][kNear][kPanel];
  uint32_t lanes[kChunk * kNear];
};

// No branch here, so that panels overlap in the processor.
template <int kWidth, int kNear>
inline void screen_panel(const Batch<kWidth, kNear>& b, int tile, int64_t panel, int place, Screened<kNear>* out) {
  const PanelPlan& plan = *b.plan;
  uint32_t lanes[kNear] = {};
  for (int u = 0; u < kPanel; u += kUnit) {
    V a[kNear], c[kNear];
    score_unit(plan.panels + panel * kWidth * kPanel + u, plan.start + panel * kPanel + u, b.q[tile], kWidth, a, c);
#pragma GCC unroll 8
    for (int r = 0; r < kNear; ++r) {
      const V limit = set(b.screen_limit[tile * kNear + r]);
      store(out->score[place][r] + u, a[r]);
      store(out->score[place][r] + u + W, c[r]);
      lanes[r] |= (less(a[r], limit) | (less(c[r], limit) << W)) << u;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kNear; ++r) out->lanes[place * kNear + r] = lanes[r];
}

// Screens up to kChunk panels for one tile and lists what survives; its codes are on their way from memory when it is evaluated.
template <int kWidth, int kNear>
__attribute__((noinline)) void screen_panels(Batch<kWidth, kNear>& b, int tile, const int32_t* panels, int count) {
  const PanelPlan& plan = *b.plan;
  const int64_t bytes = (plan.dim < 256 ? plan.dim : 256) * 4;
  Screened<kNear> screened;
  for (int i = 0; i < count; ++i) screen_panel<kWidth, kNear>(b, tile, panels[i], i, &screened);
  b.counts.panels += (int64_t)count * (b.rows - tile * kNear < kNear ? b.rows - tile * kNear : kNear);
  int32_t some[kChunk * kNear + 1];  // of screened.lanes: those that are not empty
  int n = 0, survivors = 0;
  for (int i = 0; i < count * kNear; ++i) {
    some[n] = i;
    n += screened.lanes[i] != 0;
    survivors += __builtin_popcount(screened.lanes[i]);
  }
  some[n] = 0;
  const int32_t* at = some;
  uint32_t lanes = screened.lanes[*at];
  Survivor* out = b.survivor + b.survivors;
  for (int i = 0; i < survivors; ++i) {  // one loop over all of them: its branches are foreseen
    const int lane = __builtin_ctz(lanes), place = *at / kNear, r = *at % kNear;
    const int32_t code = plan.id[(int64_t)panels[place] * kPanel + lane];
    fetch(plan.codes + (int64_t)code * plan.ld, bytes);
    *out = {tile * kNear + r, code, screened.score[place][r][lane]};
    out += code != b.first[tile * kNear + r];
    lanes &= lanes - 1;
    at += lanes == 0;
    lanes = lanes ? lanes : screened.lanes[*at];
  }
  b.survivors = (int)(out - b.survivor);
  if (b.survivors >= kEnough) evaluate_survivors(b);
}

// Panels that one tile is about to screen.
struct Queue {
  int32_t panels[kChunk + kPanelGroup];
  int count;
};

// Adds the panels of a group whose boxes are in reach of a row of the tile.
template <int kWidth, int kNear>
inline void queue_panels(Batch<kWidth, kNear>& b, int tile, int64_t group, uint32_t near, Queue* queue) {
  for (; near; near &= near - 1) queue->panels[queue->count++] = (int32_t)(group * kPanelGroup) + __builtin_ctz(near);
  if (queue->count < kChunk) return;
  screen_panels<kWidth, kNear>(b, tile, queue->panels, kChunk);
  queue->count -= kChunk;
  for (int i = 0; i < queue->count; ++i) queue->panels[i] = queue->panels[kChunk + i];
}

template <int kWidth, int kNear>
inline uint32_t near_panels(const Batch<kWidth, kNear>& b, int tile, int64_t group) {
  const int64_t box = (int64_t)kWidth * kPanelGroup;
  return near_boxes<kWidth, kNear>(b.plan->low + group * box, b.plan->high + group * box, b.plan->allowance + group * kPanelGroup, b,
                                   tile);
}

// The panels around a tile's home, where most rows have their nearest code.
template <int kWidth, int kNear>
inline void visit_home(Batch<kWidth, kNear>& b, int tile) {
  Queue queue;
  queue.count = 0;
  const int64_t group = b.home[tile] / kPanelGroup;
  queue_panels<kWidth, kNear>(b, tile, group, near_panels<kWidth, kNear>(b, tile, group), &queue);
  if (queue.count) screen_panels<kWidth, kNear>(b, tile, queue.panels, queue.count);
}

// All others.
template <int kWidth, int kNear>
inline void visit_others(Batch<kWidth, kNear>& b, int tile) {
  const PanelPlan& plan = *b.plan;
  const int64_t box = (int64_t)kWidth * kPanelGroup, home = b.home[tile] / kPanelGroup;
  Queue queue;
  queue.count = 0;
  for (int64_t block = 0; block * kPanelGroup < plan.groups_count; ++block) {
    uint32_t groups = near_boxes<kWidth, kNear>(plan.group_low + block * box, plan.group_high + block * box,
                                                plan.group_allowance + block * kPanelGroup, b, tile);
    if (block == home / kPanelGroup) groups &= ~(1u << home % kPanelGroup);
    int32_t group[kPanelGroup];
    uint32_t near[kPanelGroup];
    int some = 0;
    for (; groups; groups &= groups - 1) group[some++] = (int32_t)(block * kPanelGroup) + __builtin_ctz(groups);
    b.counts.groups += some;
    for (int i = 0; i < some; ++i) near[i] = near_panels<kWidth, kNear>(b, tile, group[i]);
    for (int i = 0; i < some; ++i) queue_panels<kWidth, kNear>(b, tile, group[i], near[i], &queue);
  }
  if (queue.count) screen_panels<kWidth, kNear>(b, tile, queue.panels, queue.count);
}

template <int kWidth, int kNear>
void search_batches(const PanelPlan& plan, const ExactCodes& e, const float* exact_rows, int64_t exact_ld, const float* rows,
                    int64_t ld, const PanelQuery* queries, const int32_t* order, const int32_t* first_panel, const int64_t* guess,
                    int64_t n, double* score, int64_t* index, PanelCounts* counts) {
  Batch<kWidth, kNear> b;
  b.plan = &plan;
  b.exact = &e;
  b.survivors = 0;
  b.counts = {};
  const int64_t row_bytes = (plan.dim < 256 ? plan.dim : 256) * 4, code_bytes = row_bytes;
  for (int64_t i = 0; i < n; i += kBatchRows, order += kBatchRows) {
    b.rows = n - i < kBatchRows ? (int)(n - i) : kBatchRows;
    const int tiles = (b.rows + kNear - 1) / kNear;
    for (int r = 0; r < kBatchRows && i + r + kBatchRows < n; ++r) {  // of the next batch: their order is not that of memory
      fetch(queries + order[kBatchRows + r], sizeof(PanelQuery));
      fetch(rows + order[kBatchRows + r] * ld, row_bytes);
    }
    for (int r = 0; r < b.rows; ++r) start_row(b, r, exact_rows + order[r] * exact_ld, rows + order[r] * ld, queries[order[r]]);
    for (int r = b.rows; r < tiles * kNear; ++r) start_empty(b, r);
    // The panel that a tile's middle row falls into is near enough to all of its rows.
    for (int t = 0; t < tiles; ++t) {
      b.home[t] = first_panel[order[t * kNear + (b.rows - t * kNear > kNear / 2 ? kNear / 2 : 0)]];
      choose_first(b, t, b.home[t]);
    }
    for (int r = 0; guess && r < b.rows; ++r)
      if (guess[order[r]] >= 0) b.first[r] = (int32_t)guess[order[r]];
    for (int r = 0; r < b.rows; ++r) fetch(plan.codes + (int64_t)(b.first[r] < 0 ? 0 : b.first[r]) * plan.ld, code_bytes);
    evaluate_first(b);
    for (int t = 0; t < tiles; ++t) visit_home<kWidth, kNear>(b, t);
    evaluate_survivors(b);
    for (int t = 0; t < tiles; ++t) visit_others<kWidth, kNear>(b, t);
    evaluate_survivors(b);
    for (int r = 0; r < b.rows; ++r) {
      compact(&b.row[r], with_slack(plan, b.upper[r]));
      b.counts.candidates += b.row[r].count;
    }
    settle_rows(e, b.row, b.rows);
    for (int r = 0; r < b.rows; ++r) {
      score[order[r]] = b.row[r].best;
      index[order[r]] = b.row[r].index;
    }
  }
  b.counts.rows = n;
  *counts = {counts->rows + n, counts->groups + b.counts.groups, counts->panels + b.counts.panels,
             counts->evaluations + b.counts.evaluations, counts->candidates + b.counts.candidates};
}

void panels(const PanelPlan& plan, const ExactCodes& e, const float* exact_rows, int64_t exact_ld, const float* rows, int64_t ld,
            const PanelQuery* queries, const int32_t* order, const int32_t* first_panel, const int64_t* guess, int64_t n,
            double* score, int64_t* index, PanelCounts* counts) {
  const bool crowded = n >= 8 * plan.panels_count;  // so that four rows in order lie close together
  const auto search = plan.width == 5 ? crowded ? search_batches<5, 4> : search_batches<5, 2>
                                      : crowded ? search_batches<9, 4> : search_batches<9, 2>;
  search(plan, e, exact_rows, exact_ld, rows, ld, queries, order, first_panel, guess, n, score, index, counts);
}
