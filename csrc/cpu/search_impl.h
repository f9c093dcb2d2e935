// The search kernels of one SIMD level, written over the vectors of lanes_*.h. Each level includes this file once, inside an
// anonymous namespace: nothing inline here may be shared with code built for another target, and nothing of std:: is used.
//
// Every test that discards a code is a proved lower bound (docs/SEARCH.md); what survives is settled by the contract's formula.

constexpr int kUnit = 2 * W;  // codes that one pass over the coordinates scores

// ---- candidates --------------------------------------------------------------------------------------------------------------

// Scores of up to kBatch pairs at a time: terms by vectors, then kBatch independent chains of additions in ascending d.
constexpr int kBatch = 8;
constexpr int kTerms = 64;

inline void pair_terms(const float* x, const float* c, int64_t n, bool difference, double* out) {
  int64_t d = 0;
  for (; d + WD <= n; d += WD) {
    D a = widen(x + d), b = widen(c + d);
    D t = dsub(a, b);
    dstore(out + d, difference ? dmul(t, t) : dmul(a, b));
  }
  for (; d < n; ++d) {
    double t = (double)x[d] - (double)c[d];
    out[d] = difference ? t * t : (double)x[d] * (double)c[d];
  }
}

void pair_sums(const ExactCodes& e, const float* const* x, const int32_t* code, int n, double* total) {
  double terms[kBatch][kTerms];
  for (int j = 0; j < kBatch; ++j) total[j] = 0.0;
  for (int64_t d0 = 0; d0 < e.dim; d0 += kTerms) {
    const int64_t len = e.dim - d0 < kTerms ? e.dim - d0 : kTerms;
    for (int j = 0; j < n; ++j)
      pair_terms(x[j] + d0, e.codes + (int64_t)code[j] * e.ld + d0, len, e.metric == kL2, terms[j]);
    if (n == kBatch) {
      for (int64_t i = 0; i < len; ++i)
        for (int j = 0; j < kBatch; ++j) total[j] += terms[j][i];
    } else {
      for (int j = 0; j < n; ++j)
        for (int64_t i = 0; i < len; ++i) total[j] += terms[j][i];
    }
  }
}

inline double score_of(const ExactCodes& e, double total, int32_t code) {
  if (e.metric == kL2) return total;
  if (e.metric == kDot) return -total;
  const double norm = e.norm[code];
  return norm > 0.0 ? -(total / __builtin_sqrt(norm)) : 0.0;
}

inline void offer(Row* row, double score, int32_t code) {
  if (score < row->best || (score == row->best && code < row->index)) {
    row->best = score;
    row->index = code;
  }
}

void settle_rows(const ExactCodes& e, Row* rows, int row_count) {
  const float* x[kBatch] = {};
  int32_t code[kBatch] = {};
  Row* owner[kBatch];
  double total[kBatch];
  int n = 0;
  for (int r = 0; r < row_count; ++r) {
    for (int i = 0; i < rows[r].count; ++i) {
      x[n] = rows[r].exact;
      code[n] = rows[r].candidate[i];
      owner[n] = &rows[r];
      if (++n == kBatch) {
        pair_sums(e, x, code, n, total);
        for (int j = 0; j < n; ++j) offer(owner[j], score_of(e, total[j], code[j]), code[j]);
        n = 0;
      }
    }
    rows[r].count = 0;
  }
  pair_sums(e, x, code, n, total);
  for (int j = 0; j < n; ++j) offer(owner[j], score_of(e, total[j], code[j]), code[j]);
}

// Drop candidates whose lower bound is no longer under the limit.
inline void compact(Row* row, float limit) {
  int kept = 0;
  for (int i = 0; i < row->count; ++i) {
    if (row->score[i] < limit) {
      row->candidate[kept] = row->candidate[i];
      row->score[kept++] = row->score[i];
    }
  }
  row->count = kept;
}

inline void append(const ExactCodes& e, Row* row, int32_t code, float score, float limit) {
  if (row->count == kCandidates) {
    compact(row, limit);
    if (row->count > kCandidates / 2) settle_rows(e, row, 1);
  }
  row->candidate[row->count] = code;
  row->score[row->count++] = score;
}

// ---- dense road --------------------------------------------------------------------------------------------------------------

// Scores of kUnit codes for kRows rows, held in registers from the first coordinate to the last.
template <int kN>
inline __attribute__((always_inline)) void score_unit(const float* codes, const float* start, const float* tile, int64_t dim,
                                                      V (&a)[kN], V (&b)[kN]) {
  const V s0 = load(start), s1 = load(start + W);
#pragma GCC unroll 16
  for (int r = 0; r < kN; ++r) {
    a[r] = s0;
    b[r] = s1;
  }
  for (int64_t d = 0; d < dim; ++d) {
    const V c0 = load(codes), c1 = load(codes + W);
#pragma GCC unroll 16
    for (int r = 0; r < kN; ++r) {
      const V x = set(tile[r]);
      a[r] = fnma(x, c0, a[r]);
      b[r] = fnma(x, c1, b[r]);
    }
    codes += kPanel;
    tile += kN;
  }
}

// A row met scores under its limit: tighten the limit by the best upper bound among them, then keep what is still under it.
__attribute__((noinline)) void collect(const ExactCodes& e, Row* row, float* row_limit, V a, V b, const float* slack,
                                       const int32_t* id) {
  const V upper = min(add(a, load(slack)), add(b, load(slack + W)));
  float limit = smallest(upper) + 2.0f * row->slack;
  limit = limit < *row_limit ? limit : *row_limit;
  *row_limit = limit;
  float scores[kUnit];
  store(scores, a);
  store(scores + W, b);
  const V bound = set(limit);
  uint32_t hits = less(a, bound) | (less(b, bound) << W);
  while (hits) {
    const int lane = __builtin_ctz(hits);
    hits &= hits - 1;
    append(e, row, id[lane], scores[lane], limit);
  }
}

void dense(const DensePlan& plan, const ExactCodes& e, const float* tiles, int64_t tile_count, float* limits, Row* rows) {
  const int64_t dim = plan.dim;
  for (int64_t p = 0; p < plan.panels_count; ++p) {
    for (int64_t t = 0; t < tile_count; ++t) {
      float* limit = limits + t * kRows;
      for (int u = 0; u < kPanel; u += kUnit) {
        V a[kRows], b[kRows];
        score_unit(plan.panels + p * dim * kPanel + u, plan.start + p * kPanel + u, tiles + t * dim * kRows, dim, a, b);
        uint32_t under = 0;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) under |= less(min(a[r], b[r]), set(limit[r]));
        if (__builtin_expect(under != 0, 0)) {
          const int64_t at = p * kPanel + u;
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            if (less(min(a[r], b[r]), set(limit[r])))
              collect(e, &rows[t * kRows + r], &limit[r], a[r], b[r], plan.slack + at, plan.id + at);
          }
        }
      }
    }
  }
  for (int64_t r = 0; r < tile_count * kRows; ++r) compact(&rows[r], limits[r]);
  settle_rows(e, rows, (int)(tile_count * kRows));
}

// ---- pruned road -------------------------------------------------------------------------------------------------------------

inline V square_difference(V acc, V a, V b) {
  const V t = sub(a, b);
  return fma(t, t, acc);
}

inline float full_distance(const float* x, const float* c, int64_t dim) {
  V s0 = set(0), s1 = set(0);
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) {
    s0 = square_difference(s0, load(x + d), load(c + d));
    s1 = square_difference(s1, load(x + d + W), load(c + d + W));
  }
  for (; d + W <= dim; d += W) s0 = square_difference(s0, load(x + d), load(c + d));
  if (d < dim) {
    const int n = (int)(dim - d);
    s1 = square_difference(s1, load_part(x + d, n), load_part(c + d, n));
  }
  return sum(add(s0, s1));
}

// What is known of one row while its panels are visited.
struct Search {
  const PanelPlan* plan;
  const ExactCodes* exact;
  const float* x;          // what full evaluation subtracts codes from
  const PanelQuery* query;
  Row* row;
  float upper;             // upper bound of the smallest squared distance
  float* screen_limit;     // a screened score under it survives
  float* box_limit;        // a box nearer than it is visited
  float slack, excess;     // of this row, in squared distance
  int64_t evaluations;
};

inline void set_limits(Search* s) {
  *s->screen_limit = 0.5f * (s->upper - s->query->norm) + s->slack;
  // 64 roundings of the box distance at most.
  *s->box_limit = (s->upper + s->excess + s->slack) * (1.0f + 64.0f * 6e-8f);
}

inline void start_search(Search* s, const PanelPlan* plan, const ExactCodes* exact, Row* row, const float* exact_row,
                         const float* x, const PanelQuery* query, float* screen_limit, float* box_limit) {
  s->plan = plan;
  s->exact = exact;
  s->x = x;
  s->query = query;
  s->row = row;
  row->exact = exact_row;
  row->best = __builtin_inf();
  row->index = INT64_MAX;
  row->count = 0;
  s->upper = __builtin_huge_valf();
  s->screen_limit = screen_limit;
  s->box_limit = box_limit;
  float square = 0;
  for (int j = 0; j < plan->width; ++j) square += query->coordinate[j] * query->coordinate[j];
  s->slack = plan->screen_rel * query->norm + plan->tiny;
  s->excess = square > query->norm ? square - query->norm : 0.0f;
  s->evaluations = 0;
  set_limits(s);
}

inline float with_slack(const PanelPlan& plan, float upper) { return upper * (1.0f + 2e-7f) + plan.tiny; }

inline void evaluate(Search* s, int32_t code) {
  const PanelPlan& plan = *s->plan;
  ++s->evaluations;
  const float square = full_distance(s->x, plan.codes + (int64_t)code * plan.ld, plan.dim);
  float low, high;
  if (plan.radius == 0.0f) {
    low = square * (1.0f - plan.full_rel) - plan.tiny;
    high = square * (1.0f + plan.full_rel) + plan.tiny;
  } else {
    const float root = __builtin_sqrtf(square);
    const float inner = root * (1.0f - plan.full_rel) - plan.radius;
    const float outer = root * (1.0f + plan.full_rel) + plan.radius;
    low = inner > 0 ? inner * inner : 0.0f;
    high = outer * outer;
  }
  if (!(low <= s->upper)) return;
  if (high < s->upper) {
    s->upper = high;
    set_limits(s);
  }
  append(*s->exact, s->row, code, low, with_slack(plan, s->upper));
}

// Rows that lie close together, searched side by side: they visit the same panels, so that every branch and every load of a panel
// serves all of them.
constexpr int kNear = 4;
constexpr uint32_t kQueue = 64, kWaiting = 12;

inline void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

template <int kWidth>
struct Tile {
  float q[kWidth * kNear];           // coordinates [kWidth, kNear]
  float screen_limit[kNear], box_limit[kNear];
  int32_t skip[kNear];               // code that was evaluated before the panels: the warm start
  Search search[kNear];
  Row row[kNear];
  // Survivors that wait while their code is on its way from memory.
  struct Hit {
    int32_t row, code;
    float score;
  };
  Hit queue[kQueue];
  uint32_t head, tail;
};

// Evaluate the oldest survivors until `left` wait; by then a better bound may have ruled them out.
template <int kWidth>
inline void drain(Tile<kWidth>& t, uint32_t left) {
  while (t.tail - t.head > left) {
    const auto hit = t.queue[t.head++ % kQueue];
    if (hit.score < t.screen_limit[hit.row]) evaluate(&t.search[hit.row], hit.code);
  }
}

template <int kWidth>
__attribute__((noinline)) void enqueue(Tile<kWidth>& t, const PanelPlan& plan, int r, V a, V b, const int32_t* id) {
  float scores[kUnit];
  store(scores, a);
  store(scores + W, b);
  const V limit = set(t.screen_limit[r]);
  uint32_t hits = less(a, limit) | (less(b, limit) << W);
  const int64_t bytes = (plan.dim < 256 ? plan.dim : 256) * 4;
  while (hits) {
    const int lane = __builtin_ctz(hits);
    hits &= hits - 1;
    if (id[lane] == t.skip[r]) continue;
    if (t.tail - t.head == kQueue) drain(t, kWaiting);
    fetch(plan.codes + (int64_t)id[lane] * plan.ld, bytes);
    t.queue[t.tail++ % kQueue] = {r, id[lane], scores[lane]};
  }
}

// Evaluate one code per row, t.skip, before any panel is visited.
template <int kWidth>
inline void bound_by_codes(Tile<kWidth>& t, const PanelPlan& plan, int used) {
  const int64_t bytes = (plan.dim < 256 ? plan.dim : 256) * 4;
  for (int r = 0; r < used; ++r)
    if (t.skip[r] >= 0) fetch(plan.codes + (int64_t)t.skip[r] * plan.ld, bytes);
  for (int r = 0; r < used; ++r)
    if (t.skip[r] >= 0) evaluate(&t.search[r], t.skip[r]);
}

// A first bound for every row: the most promising code of one panel. Their codes are fetched together.
template <int kWidth>
inline void bound_by_panel(Tile<kWidth>& t, const PanelPlan& plan, int64_t panel, int used) {
  float best[kNear];
  for (int r = 0; r < kNear; ++r) best[r] = __builtin_huge_valf();
  for (int u = 0; u < kPanel; u += kUnit) {
    V a[kNear], b[kNear];
    score_unit(plan.panels + panel * kWidth * kPanel + u, plan.start + panel * kPanel + u, t.q, kWidth, a, b);
#pragma GCC unroll 4
    for (int r = 0; r < kNear; ++r) {
      const float least = smallest(min(a[r], b[r]));
      if (!(least < best[r])) continue;
      best[r] = least;
      const int lane = __builtin_ctz(equal(a[r], set(least)) | (equal(b[r], set(least)) << W));
      t.skip[r] = plan.id[panel * kPanel + u + lane];
    }
  }
  bound_by_codes(t, plan, used);
}

template <int kWidth>
inline void visit_panel(Tile<kWidth>& t, const PanelPlan& plan, int64_t panel) {
  for (int u = 0; u < kPanel; u += kUnit) {
    V a[kNear], b[kNear];
    const int32_t* id = plan.id + panel * kPanel + u;
    score_unit(plan.panels + panel * kWidth * kPanel + u, plan.start + panel * kPanel + u, t.q, kWidth, a, b);
    uint32_t under = 0;
#pragma GCC unroll 16
    for (int r = 0; r < kNear; ++r) under |= less(min(a[r], b[r]), set(t.screen_limit[r]));
    if (under) {
#pragma GCC unroll 16
      for (int r = 0; r < kNear; ++r) {
        if (!less(min(a[r], b[r]), set(t.screen_limit[r]))) continue;
        enqueue(t, plan, r, a[r], b[r], id);
      }
    }
  }
  drain(t, kWaiting);
}

// Which of 16 boxes lie nearer to some row of the tile than that row's limit.
template <int kWidth>
inline uint32_t near_boxes(const float* low, const float* high, const float* allowance, const Tile<kWidth>& t) {
  uint32_t near = 0;
  for (int u = 0; u < kPanelGroup; u += W) {
    V acc[kNear];
    const V start = sub(set(0), load(allowance + u));
#pragma GCC unroll 4
    for (int r = 0; r < kNear; ++r) acc[r] = start;
    for (int j = 0; j < kWidth; ++j) {
      const V lo = load(low + j * kPanelGroup + u), hi = load(high + j * kPanelGroup + u);
#pragma GCC unroll 4
      for (int r = 0; r < kNear; ++r) {
        const V q = set(t.q[j * kNear + r]);
        const V out = max(max(sub(lo, q), sub(q, hi)), set(0));
        acc[r] = fma(out, out, acc[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kNear; ++r) near |= less(acc[r], set(t.box_limit[r])) << u;
  }
  return near;
}

template <int kWidth>
inline void visit_panels(Tile<kWidth>& t, const PanelPlan& plan, int used, PanelCounts* counts) {
  const int64_t box = (int64_t)kWidth * kPanelGroup;
  for (int64_t block = 0; block * kPanelGroup < plan.groups_count; ++block) {
    uint32_t groups = near_boxes<kWidth>(plan.group_low + block * box, plan.group_high + block * box,
                                         plan.group_allowance + block * kPanelGroup, t);
    while (groups) {
      const int64_t group = block * kPanelGroup + __builtin_ctz(groups);
      groups &= groups - 1;
      ++counts->groups;
      uint32_t panels = near_boxes<kWidth>(plan.low + group * box, plan.high + group * box, plan.allowance + group * kPanelGroup,
                                           t);
      while (panels) {
        const int64_t panel = group * kPanelGroup + __builtin_ctz(panels);
        panels &= panels - 1;
        counts->panels += used;
        if (panels) {  // the next one, while this one is scored
          const int64_t next = group * kPanelGroup + __builtin_ctz(panels);
          fetch(plan.panels + next * kWidth * kPanel, kWidth * kPanel * 4);
          fetch(plan.start + next * kPanel, kPanel * 4);
        }
        visit_panel<kWidth>(t, plan, panel);
      }
    }
  }
}

template <int kWidth>
inline void start_tile(Tile<kWidth>& t, const PanelPlan& plan, const ExactCodes& e, const float* exact_rows, int64_t exact_ld,
                       const float* rows, int64_t ld, const PanelQuery* queries, const int32_t* order, int used) {
  for (int r = 0; r < kNear; ++r) {
    const int64_t row = order[r < used ? r : 0];
    start_search(&t.search[r], &plan, &e, &t.row[r], exact_rows + row * exact_ld, rows + row * ld, queries + row, &t.screen_limit[r],
                 &t.box_limit[r]);
    for (int j = 0; j < kWidth; ++j) t.q[j * kNear + r] = queries[row].coordinate[j];
    t.skip[r] = -1;
    if (r >= used) t.screen_limit[r] = t.box_limit[r] = -__builtin_huge_valf();
  }
}

constexpr int kAhead = 2 * kNear;  // rows whose data is fetched ahead: their order is not that of memory

template <int kWidth>
void search_tiles(const PanelPlan& plan, const ExactCodes& e, const float* exact_rows, int64_t exact_ld, const float* rows,
                  int64_t ld, const PanelQuery* queries, const int32_t* order, const int32_t* first_panel, const int64_t* guess,
                  int64_t n, double* score, int64_t* index, PanelCounts* counts) {
  Tile<kWidth> t;
  t.head = t.tail = 0;
  const int64_t row_bytes = (plan.dim < 256 ? plan.dim : 256) * 4;
  for (int64_t i = 0; i < n; i += kNear) {
    const int used = n - i < kNear ? (int)(n - i) : kNear;
    for (int r = 0; r < kNear && i + r + kAhead < n; ++r) {
      const int64_t next = order[i + r + kAhead];
      fetch(queries + next, sizeof(PanelQuery));
      fetch(rows + next * ld, row_bytes);
    }
    start_tile<kWidth>(t, plan, e, exact_rows, exact_ld, rows, ld, queries, order + i, used);
    if (guess) {
      for (int r = 0; r < used; ++r) t.skip[r] = (int32_t)guess[order[i + r]];
      bound_by_codes(t, plan, used);
    }
    // Rows without a bound: the panel that the middle row falls into is near enough to all of them.
    bool bounded = guess != nullptr;
    for (int r = 0; r < used; ++r) bounded = bounded && t.skip[r] >= 0;
    if (!bounded) bound_by_panel(t, plan, first_panel[order[i + used / 2]], used);
    visit_panels<kWidth>(t, plan, used, counts);
    drain(t, 0);
    for (int r = 0; r < used; ++r) {
      compact(&t.row[r], with_slack(plan, t.search[r].upper));
      counts->evaluations += t.search[r].evaluations;
      counts->candidates += t.row[r].count;
    }
    settle_rows(e, t.row, used);
    for (int r = 0; r < used; ++r) {
      score[order[i + r]] = t.row[r].best;
      index[order[i + r]] = t.row[r].index;
    }
  }
  counts->rows += n;
}

void panels(const PanelPlan& plan, const ExactCodes& e, const float* exact_rows, int64_t exact_ld, const float* rows, int64_t ld,
            const PanelQuery* queries, const int32_t* order, const int32_t* first_panel, const int64_t* guess, int64_t n,
            double* score, int64_t* index, PanelCounts* counts) {
  const auto search = plan.width == 5 ? search_tiles<5> : plan.width == 9 ? search_tiles<9> : search_tiles<17>;
  search(plan, e, exact_rows, exact_ld, rows, ld, queries, order, first_panel, guess, n, score, index, counts);
}

// ---- preparation -------------------------------------------------------------------------------------------------------------

inline float direction_dot(const float* row, const float* centre, const float* direction, int64_t dim) {
  V s0 = set(0), s1 = set(0);
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) {
    s0 = fma(sub(load(row + d), load(centre + d)), load(direction + d), s0);
    s1 = fma(sub(load(row + d + W), load(centre + d + W)), load(direction + d + W), s1);
  }
  for (; d + W <= dim; d += W) s0 = fma(sub(load(row + d), load(centre + d)), load(direction + d), s0);
  if (d < dim) {
    const int n = (int)(dim - d);
    s1 = fma(sub(load_part(row + d, n), load_part(centre + d, n)), load_part(direction + d, n), s1);
  }
  return sum(add(s0, s1));
}

// All coordinates of a centred row in one pass over it.
template <int kDirections>
inline void project_all(const float* row, const float* centre, const float* basis, int64_t ld, int64_t dim, float rest_rel,
                        PanelQuery* out) {
  V y[kDirections], square = set(0);
#pragma GCC unroll 16
  for (int j = 0; j < kDirections; ++j) y[j] = set(0);
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    const V x = sub(load(row + d), load(centre + d));
    square = fma(x, x, square);
#pragma GCC unroll 16
    for (int j = 0; j < kDirections; ++j) y[j] = fma(x, load(basis + j * ld + d), y[j]);
  }
  if (d < dim) {
    const int n = (int)(dim - d);
    const V x = sub(load_part(row + d, n), load_part(centre + d, n));
    square = fma(x, x, square);
#pragma GCC unroll 16
    for (int j = 0; j < kDirections; ++j) y[j] = fma(x, load_part(basis + j * ld + d, n), y[j]);
  }
  const float norm = sum(square);
  float kept = 0;
#pragma GCC unroll 16
  for (int j = 0; j < kDirections; ++j) {
    out->coordinate[j] = sum(y[j]);
    kept += out->coordinate[j] * out->coordinate[j];
  }
  const float rest = norm * (1.0f + rest_rel) - kept;
  out->coordinate[kDirections] = rest > 0 ? __builtin_sqrtf(rest) * (1.0f + 5e-7f) : 0.0f;
  out->norm = norm;
}

void project(const float* row, const float* centre, const float* basis, int64_t ld, int directions, int64_t dim, float rest_rel,
             PanelQuery* out) {
  switch (directions) {
    case 4: return project_all<4>(row, centre, basis, ld, dim, rest_rel, out);
    case 8: return project_all<8>(row, centre, basis, ld, dim, rest_rel, out);
    default: return project_all<16>(row, centre, basis, ld, dim, rest_rel, out);
  }
}

void apply_covariance(const float* row, const float* centre, const float* basis, int directions, int64_t dim, float* out) {
  for (int j = 0; j < directions; ++j) {
    const V y = set(direction_dot(row, centre, basis + j * dim, dim));
    float* to = out + j * dim;
    int64_t d = 0;
    for (; d + W <= dim; d += W) store(to + d, fma(y, sub(load(row + d), load(centre + d)), load(to + d)));
    if (d < dim) {
      const int n = (int)(dim - d);
      store_part(to + d, fma(y, sub(load_part(row + d, n), load_part(centre + d, n)), load_part(to + d, n)), n);
    }
  }
}

uint64_t inspect(const float* row, int64_t dim, bool* finite) {
  bool good = true;
  H hash = hash_start();
  for (int64_t d = 0; d < dim; d += W) {
    const int n = dim - d < W ? (int)(dim - d) : W;
    const V v = add(n == W ? load(row + d) : load_part(row + d, n), set(0));  // -0 becomes +0
    good = good && all_finite(v);
    hash = hash_mix(hash, v);
  }
  *finite = good;
  uint32_t lanes[W];
  hash_store(lanes, hash);
  uint64_t total = 0x9E3779B97F4A7C15ull;
  for (int i = 0; i < W; ++i) total = (total ^ lanes[i]) * 0x9FB21C651E98DF25ull, total ^= total >> 31;
  return total;
}

double centred_norm(const float* row, const float* centre, int64_t dim) {
  double part[4] = {0, 0, 0, 0};
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4) {
    for (int j = 0; j < 4; ++j) {
      const double t = (double)row[d + j] - (double)centre[d + j];
      part[j] += t * t;
    }
  }
  for (; d < dim; ++d) {
    const double t = (double)row[d] - (double)centre[d];
    part[0] += t * t;
  }
  return (part[0] + part[1]) + (part[2] + part[3]);
}

void accumulate(double* total, const float* row, int64_t dim) {
  int64_t d = 0;
  for (; d + WD <= dim; d += WD) dstore(total + d, dadd(dload(total + d), widen(row + d)));
  for (; d < dim; ++d) total[d] += (double)row[d];
}

constexpr Kernels kTable = {kRows,   kOpsPerTerm,      dense,   settle_rows, panels,
                            project, apply_covariance, inspect, centred_norm, accumulate};
