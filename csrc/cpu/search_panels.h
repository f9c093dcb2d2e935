// The pruned road of one SIMD level; included by search_impl.h.
//
// Rows are searched kBatchRows at a time, in steps: a first bound for each row from the panels about its home, boxes that say which
// panels to visit, principal coordinates that say which of their codes survive, distances in float32 of those, and the contract's formula
// for what is then still in reach. Each step is taken for all rows of a batch before the next: a branch that waits for a step's
// result would stop the processor from overlapping the rows, but by the time all rows have taken a step the first results are there.

constexpr int kBatchRows = 32;
constexpr int kBounds = 16;     // distances whose bounds are looked at together
constexpr int kVisits = 16;     // visits that are screened before their survivors are listed
constexpr int kEnough = 64;     // survivors that are evaluated together

// So that a bound is written once, for one row and for W of them.
inline float add(float a, float b) { return a + b; }
inline float sub(float a, float b) { return a - b; }
inline float mul(float a, float b) { return a * b; }
inline float fma(float a, float b, float c) { return a * b + c; }
inline float root(float a) { return __builtin_sqrtf(a); }
inline float min(float a, float b) { return a < b ? a : b; }
inline float max(float a, float b) { return a > b ? a : b; }
inline float like(float, float a) { return a; }
inline V like(V, float a) { return set(a); }

struct Survivor {
  int32_t row, code, score;
};

struct Visit {
  int32_t tile, panel;
};

// kNear rows make a tile: they lie close together and visit the same panels. kTwos: pairs of coordinates.
template <int kTwos, int kNear>
struct Batch {
  static constexpr int kTiles = kBatchRows / kNear;
  const PanelPlan* plan;
  const ExactCodes* exact;
  int rows, tiles;
  int32_t home[kTiles];                // the panel that a row of the tile falls into
  alignas(64) int32_t q[kTwos][kBatchRows];  // pairs of coordinates of the rows
  int32_t screen_limit[kBatchRows];    // a screened score up to it survives
  int32_t box_limit[kBatchRows];       // a box up to this squared distance is visited
  int32_t square[kBatchRows];          // of the coordinates
  float upper[kBatchRows];             // upper bound of the smallest squared distance
  float norm[kBatchRows], length[kBatchRows];  // |x - centre|^2 and its root
  float excess[kBatchRows];            // what a row adds to squared distances of coordinates
  int32_t first[kBatchRows];           // code that is evaluated before the panels; -1: none
  int32_t first_at[kBatchRows];        // its place in its group of panels, kPanel to a panel; -1: not known
  const float* x[kBatchRows];          // what distances subtract codes from
  Row row[kBatchRows];
  Visit visit[kVisits + kPanelGroup];   // that wait for the screen
  alignas(64) uint32_t left[kVisits + kPanelGroup][kNear];  // lanes of the visit's panel that a row has yet to evaluate: all but its first code
  int visits;
  Survivor survivor[kEnough + kVisits * kNear * kPanel];
  int survivors;
  PanelCounts counts;
};

// What squared distances of grid points may be where the true one is `upper` at most. None of them reaches kNoLimit.
constexpr float kNoLimit = 2147483520.0f;
template <class T>
inline T grid_limit(const PanelPlan& plan, T upper, T length, T excess) {
  const T code = add(length, root(upper));  // |c| <= |x| + |x - c|
  const T far = fma(mul(like(code, plan.code_rel), code), code, add(upper, excess));
  const T steps = fma(root(far), like(far, plan.per_unit), like(far, plan.rounding));
  return min(fma(mul(steps, steps), like(steps, 1.0f + 2e-6f), like(steps, 1.0f)), like(steps, kNoLimit));
}

template <int kTwos, int kNear>
inline void set_limits(Batch<kTwos, kNear>& b, int r) {
  b.box_limit[r] = (int32_t)grid_limit(*b.plan, b.upper[r], b.length[r], b.excess[r]);
  b.screen_limit[r] = (b.box_limit[r] - b.square[r]) >> 1;  // rounded down
}

// The same for all rows.
template <int kTwos, int kNear>
inline void set_all_limits(Batch<kTwos, kNear>& b) {
  for (int r = 0; r < kBatchRows; r += W) {
    const I box = to_steps(grid_limit(*b.plan, load(b.upper + r), load(b.length + r), load(b.excess + r)));
    istore(b.box_limit + r, box);
    istore(b.screen_limit + r, half_difference(box, iload(b.square + r)));
  }
}

inline float with_slack(const PanelPlan& plan, float upper) { return upper * (1.0f + 2e-7f) + plan.tiny; }

// ---- distances ---------------------------------------------------------------------------------------------------------------

// Squared distances of kPairs pairs; kOneRow: of the first row with each of the codes.
template <bool kOneRow>
inline void full_distances(const float* const* x, const float* const* c, int64_t dim, float* out) {
  V total[kPairs];
#pragma GCC unroll 4
  for (int j = 0; j < kPairs; ++j) total[j] = set(0);
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      const V t = sub(load(x[kOneRow ? 0 : j] + d), load(c[j] + d));
      total[j] = fma(t, t, total[j]);
    }
  }
  if (d < dim) {
    const int n = (int)(dim - d);
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      const V t = sub(load_part(x[kOneRow ? 0 : j] + d, n), load_part(c[j] + d, n));
      total[j] = fma(t, t, total[j]);
    }
  }
  four_sums(total, out);
}

// Lower and upper bound of the true squared distance where float32 gives `square`.
template <class T>
inline void full_bounds(const PanelPlan& plan, T square, T* low, T* high) {
  const T less = like(square, 1.0f - plan.full_rel), more = like(square, 1.0f + plan.full_rel);
  if (plan.radius == 0.0f) {
    *low = sub(mul(square, less), like(square, plan.tiny));
    *high = add(mul(square, more), like(square, plan.tiny));
    return;
  }
  const T length = root(square), radius = like(square, plan.radius);
  const T inner = max(sub(mul(length, less), radius), like(square, 0.0f)), outer = add(mul(length, more), radius);
  *low = mul(inner, inner);
  *high = mul(outer, outer);
}

// A row met a distance that may be its least.
template <int kTwos, int kNear>
inline void take(Batch<kTwos, kNear>& b, int r, int32_t code, float low, float high) {
  if (!(low <= b.upper[r])) return;
  const PanelPlan& plan = *b.plan;
  if (high < b.upper[r]) {
    b.upper[r] = high;
    set_limits(b, r);
    compact(&b.row[r], with_slack(plan, high));
  }
  append(*b.exact, &b.row[r], code, low, with_slack(plan, b.upper[r]));
}

// n codes, kBounds at most, of the rows named: candidates unless their lower bound is over the best upper bound. Both arrays go on for
// kPairs - 1 more.
template <int kTwos, int kNear>
inline void evaluate(Batch<kTwos, kNear>& b, const int32_t* row, const int32_t* code, int n) {
  const PanelPlan& plan = *b.plan;
  alignas(64) float square[kBounds], upper[kBounds], low[kBounds], high[kBounds];
  for (int at = 0; at < n; at += kPairs) {
    const float *x[kPairs], *c[kPairs];
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      x[j] = b.x[row[at + j]];
      c[j] = plan.codes + (int64_t)code[at + j] * plan.ld;
      upper[at + j] = b.upper[row[at + j]];
    }
    if (x[0] == x[1] && x[0] == x[2] && x[0] == x[3]) full_distances<true>(x, c, plan.dim, square + at);
    else full_distances<false>(x, c, plan.dim, square + at);
  }
  b.counts.evaluations += n;
  uint32_t over = 0;
  for (int j = 0; j < kBounds; j += W) {
    V least, most;
    full_bounds(plan, load(square + j), &least, &most);
    store(low + j, least);
    store(high + j, most);
    over |= less(load(upper + j), least) << j;
  }
  for (uint32_t hits = ~over & ((1u << n) - 1); hits; hits &= hits - 1) {
    const int j = __builtin_ctz(hits);
    take(b, row[j], code[j], low[j], high[j]);
  }
}

// Evaluates the survivors in the order they came, in which those of a row follow one another; a better bound rules out some that still
// wait.
template <int kTwos, int kNear>
__attribute__((noinline)) void evaluate_survivors(Batch<kTwos, kNear>& b) {
  int32_t row[kBounds + kPairs], code[kBounds + kPairs];
  for (int i = 0; i < b.survivors;) {
    int n = 0;
    for (; i < b.survivors && n < kBounds; ++i) {
      const Survivor& s = b.survivor[i];
      row[n] = s.row;
      code[n] = s.code;
      n += s.score <= b.screen_limit[s.row];
    }
    for (int j = n; j < n + kPairs; ++j) row[j] = row[0], code[j] = code[0];
    if (n) evaluate(b, row, code, n);
  }
  b.survivors = 0;
}

// ---- first bounds ------------------------------------------------------------------------------------------------------------

// Scores of kUnit codes for the rows of a tile: half the squared distance of grid points less half the row's own square, rounded down.
template <int kTwos, int kNear>
inline __attribute__((always_inline)) void score_on_grid(const int32_t* codes, const int32_t* start, const int32_t* rows,
                                                         I (&a)[kNear], I (&c)[kNear]) {
  const I s0 = iload(start), s1 = iload(start + W);
#pragma GCC unroll 8
  for (int r = 0; r < kNear; ++r) a[r] = s0, c[r] = s1;
#pragma GCC unroll 8
  for (int j = 0; j < kTwos; ++j) {
    const I c0 = iload(codes + j * kPanel), c1 = iload(codes + j * kPanel + W);
#pragma GCC unroll 8
    for (int r = 0; r < kNear; ++r) {
      const I q = iset(rows[j * kBatchRows + r]);
      a[r] = add_dots(a[r], q, c0);
      c[r] = add_dots(c[r], q, c1);
    }
  }
}

template <int kTwos, int kNear>
inline void start_row(Batch<kTwos, kNear>& b, int r, const float* exact, const float* x, const PanelQuery& query) {
#pragma GCC unroll 8
  for (int j = 0; j < kTwos; ++j) __builtin_memcpy(&b.q[j][r], query.grid + 2 * j, sizeof(int32_t));
  b.norm[r] = query.norm;
  b.excess[r] = query.excess;
  b.upper[r] = __builtin_huge_valf();
  b.first[r] = b.first_at[r] = -1;
  b.x[r] = x;
  b.row[r].exact = exact;
  b.row[r].best = __builtin_inf();
  b.row[r].index = INT64_MAX;
  b.row[r].count = 0;
}

// A place without a row: it visits nothing and collects nothing.
template <int kTwos, int kNear>
inline void start_empty(Batch<kTwos, kNear>& b, int r) {
  for (int j = 0; j < kTwos; ++j) b.q[j][r] = 0;
  b.first[r] = b.first_at[r] = -1;
  b.norm[r] = b.excess[r] = 0.0f;
  b.row[r].count = 0;
}

// What follows from the coordinates and norms of all rows.
template <int kTwos, int kNear>
inline void measure_rows(Batch<kTwos, kNear>& b) {
  for (int r = 0; r < kBatchRows; r += W) {
    I square = iset(0);
    for (int j = 0; j < kTwos; ++j) square = add_dots(square, iload(b.q[j] + r), iload(b.q[j] + r));
    istore(b.square + r, square);
    const V norm = load(b.norm + r);
    store(b.length + r, mul(root(norm), set(1.0f + 2e-6f)));
    store(b.excess + r, add(fma(norm, set(b.plan->row_rel), load(b.excess + r)), set(b.plan->tiny)));
  }
}

// The most promising code of kFirstPanels panels about a tile's home, for each of its rows: the nearest if the rests of row and code were
// orthogonal, which says more than the lower bound. The vector of a score stands in its last bits: one search tells score and place.
template <int kTwos, int kNear>
inline void choose_first(Batch<kTwos, kNear>& b, int tile, int64_t home) {
  constexpr int32_t kLast = kFirstPanels * kPanel / W - 1;
  const PanelPlan& plan = *b.plan;
  const int64_t begin = home / kFirstPanels * kFirstPanels, end = begin + kFirstPanels < plan.panels_count ? begin + kFirstPanels : plan.panels_count;
  int32_t principal[kTwos][kBatchRows];  // the tile's coordinates without the norm of the rest: the high half of the last pair
  for (int j = 0; j < kTwos; ++j)
    for (int r = 0; r < kNear; ++r) principal[j][r] = b.q[j][tile * kNear + r] & (j == kTwos - 1 ? 0xFFFF : -1);
  I best[kNear];
  for (int r = 0; r < kNear; ++r) best[r] = iset(INT32_MAX);
  for (int64_t at = begin * kPanel; at < end * kPanel; at += kUnit) {
    I a[kNear], c[kNear];
    score_on_grid<kTwos, kNear>(plan.panels + at / kPanel * kTwos * kPanel + at % kPanel, plan.start + at, principal[0], a, c);
    const I vector = iset((int32_t)(at - begin * kPanel) / W), next = iset((int32_t)(at - begin * kPanel) / W + 1);
#pragma GCC unroll 8
    for (int r = 0; r < kNear; ++r) best[r] = imin(best[r], imin(with_bits(a[r], iset(kLast), vector), with_bits(c[r], iset(kLast), next)));
  }
  for (int r = 0; r < kNear; ++r) {
    const int32_t least = ismallest(best[r]), lane = __builtin_ctz(iequal(best[r], iset(least)));
    if (least >= INT32_MAX - kLast) continue;
    const int64_t at = begin * kPanel + (least & kLast) * W + lane;
    b.first[tile * kNear + r] = plan.id[at];
    static_assert(kPanelGroup % kFirstPanels == 0, "the home's group holds them all");
    b.first_at[tile * kNear + r] = (int32_t)(at % (kPanelGroup * kPanel));
  }
}

// Evaluates the first code of every row that has one: the only candidate so far.
template <int kTwos, int kNear>
inline void evaluate_first(Batch<kTwos, kNear>& b) {
  const PanelPlan& plan = *b.plan;
  alignas(64) float square[kBatchRows] = {}, low[kBatchRows];
  for (int r0 = 0; r0 < b.rows; r0 += kPairs) {
    const float *x[kPairs], *c[kPairs];
    for (int j = 0; j < kPairs; ++j) {
      const int r = r0 + j < b.rows ? r0 + j : 0;
      x[j] = b.x[r];
      c[j] = plan.codes + (int64_t)(b.first[r] < 0 ? 0 : b.first[r]) * plan.ld;
    }
    full_distances<false>(x, c, plan.dim, square + r0);
  }
  for (int r = 0; r < kBatchRows; r += W) {
    V least, upper;
    full_bounds(plan, load(square + r), &least, &upper);
    store(low + r, least);
    store(b.upper + r, upper);
  }
  for (int r = 0; r < b.rows; ++r) {
    const bool some = b.first[r] >= 0;
    b.upper[r] = some ? b.upper[r] : __builtin_huge_valf();
    b.row[r].candidate[0] = b.first[r];
    b.row[r].score[0] = low[r];
    b.row[r].count = some;
  }
  b.counts.evaluations += b.rows;
  set_all_limits(b);
  for (int r = b.rows; r < kBatchRows; ++r) b.box_limit[r] = b.screen_limit[r] = INT32_MIN;
}

// ---- panels ------------------------------------------------------------------------------------------------------------------

// Which of 16 boxes lie nearer to some row of the tile than that row's limit.
template <int kTwos, int kNear>
inline uint32_t near_boxes(const int32_t* low, const int32_t* high, const Batch<kTwos, kNear>& b, int tile) {
  uint32_t near = 0;
  for (int u = 0; u < kPanelGroup; u += W) {
    I acc[kNear];
#pragma GCC unroll 8
    for (int r = 0; r < kNear; ++r) acc[r] = iset(0);
#pragma GCC unroll 8
    for (int j = 0; j < kTwos; ++j) {
      const I lo = iload(low + j * kPanelGroup + u), hi = iload(high + j * kPanelGroup + u);
#pragma GCC unroll 8
      for (int r = 0; r < kNear; ++r) {
        const I q = iset(b.q[j][tile * kNear + r]);
        const I out = isub_pairs(q, imax_pairs(imin_pairs(q, hi), lo));
        acc[r] = add_dots(acc[r], out, out);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kNear; ++r) near |= at_most(acc[r], iset(b.box_limit[tile * kNear + r])) << u;
  }
  return near;
}

// Visits on their way through the screen: all scores, and which codes are under the rows' limits.
template <int kNear>
struct Screened {
  alignas(64) int32_t score[kVisits][kNear][kPanel];
  alignas(64) uint32_t lanes[kNear * kVisits];  // of one row after the other
};

// No branch here, so that visits overlap in the processor.
template <int kTwos, int kNear>
inline void screen_panel(const Batch<kTwos, kNear>& b, int place, Screened<kNear>* out) {
  const PanelPlan& plan = *b.plan;
  const int tile = b.visit[place].tile;
  const int64_t panel = b.visit[place].panel;
  uint32_t lanes[kNear] = {};
  for (int u = 0; u < kPanel; u += kUnit) {
    I a[kNear], c[kNear];
    score_on_grid<kTwos, kNear>(plan.panels + panel * kTwos * kPanel + u, plan.start + panel * kPanel + u, b.q[0] + tile * kNear, a, c);
#pragma GCC unroll 8
    for (int r = 0; r < kNear; ++r) {
      const I limit = iset(b.screen_limit[tile * kNear + r]);
      istore(out->score[place][r] + u, a[r]);
      istore(out->score[place][r] + u + W, c[r]);
      lanes[r] |= (at_most(a[r], limit) | (at_most(c[r], limit) << W)) << u;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kNear; ++r) out->lanes[r * kVisits + place] = lanes[r] & b.left[place][r];
}

// Screens up to kVisits visits and lists what survives; its codes are on their way from memory when it is evaluated.
template <int kTwos, int kNear>
__attribute__((noinline)) void screen_visits(Batch<kTwos, kNear>& b, int count) {
  const PanelPlan& plan = *b.plan;
  Screened<kNear> screened;
  for (int i = 0; i < count; ++i) screen_panel<kTwos, kNear>(b, i, &screened);
  for (int r = 0; r < kNear; ++r)
    for (int i = count; i < kVisits; ++i) screened.lanes[r * kVisits + i] = 0;
  Survivor* out = b.survivor + b.survivors;
  for (uint64_t some = not_zero<kVisits * kNear>(screened.lanes); some; some &= some - 1) {
    const int at = __builtin_ctzll(some), place = at % kVisits, r = at / kVisits, row = b.visit[place].tile * kNear + r;
    const int32_t* id = plan.id + (int64_t)b.visit[place].panel * kPanel;
    for (uint32_t lanes = screened.lanes[at]; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      fetch(plan.codes + (int64_t)id[lane] * plan.ld, plan.dim);
      *out = {row, id[lane], screened.score[place][r][lane]};
      out += id[lane] != b.first[row];  // a guess, whose place is not known
    }
  }
  b.survivors = (int)(out - b.survivor);
  if (b.survivors >= kEnough) evaluate_survivors(b);
}

// Adds the panels of a group whose boxes are in reach of a row of the tile.
template <int kTwos, int kNear>
inline void add_visits(Batch<kTwos, kNear>& b, int tile, int64_t group, uint32_t near) {
  for (; near; near &= near - 1) b.visit[b.visits++] = {tile, (int32_t)(group * kPanelGroup) + __builtin_ctz(near)};
}

// True: a chunk was full, and what is left over stands in front.
template <int kTwos, int kNear>
inline bool screen_full_chunk(Batch<kTwos, kNear>& b) {
  if (b.visits < kVisits) return false;
  screen_visits<kTwos, kNear>(b, kVisits);
  b.visits -= kVisits;
  for (int i = 0; i < b.visits; ++i) b.visit[i] = b.visit[kVisits + i];
  return true;
}

template <int kTwos, int kNear>
inline void finish_visits(Batch<kTwos, kNear>& b) {
  if (b.visits) screen_visits<kTwos, kNear>(b, b.visits);
  b.visits = 0;
  evaluate_survivors(b);
}

// The first `count` of 16, which may be all: the last boxes of a group may hold nothing.
inline uint32_t first_of_16(int64_t count) { return count < kPanelGroup ? (1u << count) - 1 : (1u << kPanelGroup) - 1; }

template <int kTwos, int kNear>
inline uint32_t near_panels(const Batch<kTwos, kNear>& b, int tile, int64_t group) {
  const int64_t box = (int64_t)kTwos * kPanelGroup;
  return near_boxes<kTwos, kNear>(b.plan->low + group * box, b.plan->high + group * box, b, tile) &
         first_of_16(b.plan->panels_count - group * kPanelGroup);
}

template <int kTwos, int kNear>
inline int rows_of_tile(const Batch<kTwos, kNear>& b, int tile) {
  return b.rows - tile * kNear < kNear ? b.rows - tile * kNear : kNear;
}

// The panels around each tile's home, where most rows have their nearest code.
template <int kTwos, int kNear>
inline void visit_home(Batch<kTwos, kNear>& b) {
  uint32_t near[b.kTiles];
  for (int t = 0; t < b.tiles; ++t) near[t] = near_panels<kTwos, kNear>(b, t, b.home[t] / kPanelGroup);
  for (int t = 0; t < b.tiles; ++t) {
    b.counts.panels += (int64_t)__builtin_popcount(near[t]) * rows_of_tile(b, t);
    const int before = b.visits;
    add_visits<kTwos, kNear>(b, t, b.home[t] / kPanelGroup, near[t]);
    for (int r = 0; r < kNear; ++r) {
      const int32_t at = b.first_at[t * kNear + r];
      const uint32_t panel = 1u << (uint32_t)at / kPanel % kPanelGroup;
      if (at >= 0 && (near[t] & panel)) b.left[before + __builtin_popcount(near[t] & (panel - 1))][r] = ~(1u << at % kPanel);
    }
    if (!screen_full_chunk(b)) continue;
    static_assert(kPanelGroup <= kVisits, "what is carried over fits in front");
    __builtin_memcpy(b.left, b.left + kVisits, sizeof(b.left) - sizeof(b.left[0]) * kVisits);
    __builtin_memset(b.left + kVisits, 0xFF, sizeof(b.left) - sizeof(b.left[0]) * kVisits);
  }
  finish_visits(b);
  __builtin_memset(b.left, 0xFF, sizeof(b.left));
}

// All others: groups first, then the panels of those in reach.
template <int kTwos, int kNear>
inline void visit_others(Batch<kTwos, kNear>& b) {
  const PanelPlan& plan = *b.plan;
  const int64_t box = (int64_t)kTwos * kPanelGroup;
  if (plan.groups_count == 1) return;
  for (int64_t block = 0; block * kPanelGroup < plan.groups_count; ++block) {
    uint32_t groups[b.kTiles];
    for (int t = 0; t < b.tiles; ++t) {
      const int64_t home = b.home[t] / kPanelGroup;
      groups[t] = near_boxes<kTwos, kNear>(plan.group_low + block * box, plan.group_high + block * box, b, t) &
                  first_of_16(plan.groups_count - block * kPanelGroup);
      if (block == home / kPanelGroup) groups[t] &= ~(1u << home % kPanelGroup);
    }
    struct Reach {
      int32_t tile, group;
    } reach[b.kTiles * kPanelGroup];
    uint32_t near[b.kTiles * kPanelGroup];
    int count = 0;
    for (int t = 0; t < b.tiles; ++t)
      for (uint32_t left = groups[t]; left; left &= left - 1)
        reach[count++] = {t, (int32_t)(block * kPanelGroup) + __builtin_ctz(left)};
    b.counts.groups += count;
    for (int i = 0; i < count; ++i) near[i] = near_panels<kTwos, kNear>(b, reach[i].tile, reach[i].group);
    for (int i = 0; i < count; ++i) {
      b.counts.panels += (int64_t)__builtin_popcount(near[i]) * rows_of_tile(b, reach[i].tile);
      add_visits<kTwos, kNear>(b, reach[i].tile, reach[i].group, near[i]);
      screen_full_chunk(b);
    }
  }
  finish_visits(b);
}

// ---- the search --------------------------------------------------------------------------------------------------------------

template <int kTwos, int kNear>
void search_batches(const PanelPlan& plan, const ExactCodes& e, const float* exact_rows, int64_t exact_ld, const float* rows,
                    int64_t ld, const PanelQuery* queries, const int32_t* order, const int32_t* first_panel, const int64_t* guess,
                    int64_t n, double* score, int64_t* index, PanelCounts* counts) {
  Batch<kTwos, kNear> b;
  b.plan = &plan;
  b.exact = &e;
  b.survivors = b.visits = 0;
  __builtin_memset(b.left, 0xFF, sizeof(b.left));
  b.counts = {};
  for (int64_t i = 0; i < n; i += kBatchRows, order += kBatchRows) {
    b.rows = n - i < kBatchRows ? (int)(n - i) : kBatchRows;
    b.tiles = (b.rows + kNear - 1) / kNear;
    for (int r = 0; r < b.rows; ++r) start_row(b, r, exact_rows + order[r] * exact_ld, rows + order[r] * ld, queries[order[r]]);
    for (int r = b.rows; r < kBatchRows; ++r) start_empty(b, r);
    measure_rows(b);
    // The panel that a tile's middle row falls into is near enough to all of its rows.
    for (int t = 0; t < b.tiles; ++t) {
      b.home[t] = first_panel[order[t * kNear + (b.rows - t * kNear > kNear / 2 ? kNear / 2 : 0)]];
      choose_first(b, t, b.home[t]);
      for (int r = t * kNear; r < (t + 1) * kNear; ++r) {
        fetch(plan.codes + (int64_t)(b.first[r] < 0 ? 0 : b.first[r]) * plan.ld, plan.dim);
        if (i + r + kBatchRows >= n) continue;  // and a row of the next batch, as their order is not that of memory
        __builtin_prefetch(queries + order[kBatchRows + r]);
        fetch(rows + order[kBatchRows + r] * ld, plan.dim);
      }
    }
    for (int r = 0; guess && r < b.rows; ++r)
      if (guess[order[r]] >= 0) b.first[r] = (int32_t)guess[order[r]], b.first_at[r] = -1;
    evaluate_first(b);
    visit_home<kTwos, kNear>(b);
    visit_others<kTwos, kNear>(b);
    for (int r = 0; r < b.rows; ++r) b.counts.candidates += b.row[r].count;
    finish_search(e, b.row, b.rows);
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
  const auto search = plan.coordinates == 4    ? crowded ? search_batches<2, 4> : search_batches<2, 2>
                      : plan.coordinates == 10 ? crowded ? search_batches<5, 4> : search_batches<5, 2>
                                               : crowded ? search_batches<6, 4> : search_batches<6, 2>;
  search(plan, e, exact_rows, exact_ld, rows, ld, queries, order, first_panel, guess, n, score, index, counts);
}
