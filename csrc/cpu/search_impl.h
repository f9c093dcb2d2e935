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
inline __attribute__((always_inline)) void score_unit(const float* codes, const float* start, const float* tile, int64_t dim,
                                                      V (&a)[kRows], V (&b)[kRows]) {
  const V s0 = load(start), s1 = load(start + W);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    a[r] = s0;
    b[r] = s1;
  }
  for (int64_t d = 0; d < dim; ++d) {
    const V c0 = load(codes), c1 = load(codes + W);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = set(tile[r]);
      a[r] = fnma(x, c0, a[r]);
      b[r] = fnma(x, c1, b[r]);
    }
    codes += kPanel;
    tile += kRows;
  }
}

// A row met scores under its limit: tighten the limit by the best upper bound among them, then keep what is still under it.
__attribute__((noinline)) void collect(const ExactCodes& e, Row* row, V a, V b, const float* slack, const int32_t* id) {
  const V upper = min(add(a, load(slack)), add(b, load(slack + W)));
  const float limit = smallest(upper) + 2.0f * row->slack;
  if (limit < row->limit) row->limit = limit;
  float scores[kUnit];
  store(scores, a);
  store(scores + W, b);
  const V bound = set(row->limit);
  uint32_t hits = less(a, bound) | (less(b, bound) << W);
  while (hits) {
    const int lane = __builtin_ctz(hits);
    hits &= hits - 1;
    append(e, row, id[lane], scores[lane], row->limit);
  }
}

void dense(const DensePlan& plan, const ExactCodes& e, const float* tiles, int64_t tile_count, Row* rows) {
  const int64_t dim = plan.dim;
  for (int64_t p = 0; p < plan.panels_count; ++p) {
    for (int64_t t = 0; t < tile_count; ++t) {
      Row* tile_rows = rows + t * kRows;
      for (int u = 0; u < kPanel; u += kUnit) {
        V a[kRows], b[kRows];
        score_unit(plan.panels + p * dim * kPanel + u, plan.start + p * kPanel + u, tiles + t * dim * kRows, dim, a, b);
        uint32_t under = 0;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) under |= less(min(a[r], b[r]), set(tile_rows[r].limit));
        if (__builtin_expect(under != 0, 0)) {
          const int64_t at = p * kPanel + u;
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            if (less(min(a[r], b[r]), set(tile_rows[r].limit)))
              collect(e, &tile_rows[r], a[r], b[r], plan.slack + at, plan.id + at);
          }
        }
      }
    }
  }
  for (int64_t r = 0; r < tile_count * kRows; ++r) compact(&rows[r], rows[r].limit);
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
  const PanelPlan& plan;
  const ExactCodes& exact;
  const float* x;          // what full evaluation subtracts codes from
  const PanelQuery* query;
  Row* row;
  float upper;             // upper bound of the smallest squared distance
  float screen_limit;      // a screened score under it survives
  float box_limit;         // a box nearer than it is visited
  int32_t nearest;         // code of that upper bound, for the next row's start
  int64_t evaluations;
};

inline void set_limits(Search& s) {
  const float norm = s.query->norm;
  float square = 0;
  for (int j = 0; j < s.plan.width; ++j) square += s.query->coordinate[j] * s.query->coordinate[j];
  const float slack = s.plan.screen_rel * norm + s.plan.tiny;
  s.screen_limit = 0.5f * (s.upper - norm) + slack;
  const float excess = square > norm ? square - norm : 0.0f;
  // 64 roundings of the box distance at most.
  s.box_limit = (s.upper + excess + slack) * (1.0f + 64.0f * 6e-8f);
}

inline void evaluate(Search& s, int32_t code) {
  ++s.evaluations;
  const float square = full_distance(s.x, s.plan.codes + (int64_t)code * s.plan.ld, s.plan.dim);
  float low, high;
  if (s.plan.radius == 0.0f) {
    low = square * (1.0f - s.plan.full_rel) - s.plan.tiny;
    high = square * (1.0f + s.plan.full_rel) + s.plan.tiny;
  } else {
    const float root = __builtin_sqrtf(square);
    const float inner = root * (1.0f - s.plan.full_rel) - s.plan.radius;
    const float outer = root * (1.0f + s.plan.full_rel) + s.plan.radius;
    low = inner > 0 ? inner * inner : 0.0f;
    high = outer * outer;
  }
  if (!(low <= s.upper)) return;
  if (high < s.upper) {
    s.upper = high;
    s.nearest = code;
    set_limits(s);
  }
  append(s.exact, s.row, code, low, s.upper * (1.0f + 2e-7f) + s.plan.tiny);
}

template <int kWidth>
inline void screen_panel(Search& s, int64_t panel, int32_t skip) {
  const float* at = s.plan.panels + panel * kWidth * kPanel;
  const float* start = s.plan.start + panel * kPanel;
  const int32_t* id = s.plan.id + panel * kPanel;
  uint32_t hits = 0;
  for (int u = 0; u < kPanel; u += kUnit) {
    V a = load(start + u), b = load(start + u + W);
#pragma GCC unroll 17
    for (int j = 0; j < kWidth; ++j) {
      const V q = set(s.query->coordinate[j]);
      a = fnma(q, load(at + j * kPanel + u), a);
      b = fnma(q, load(at + j * kPanel + u + W), b);
    }
    const V limit = set(s.screen_limit);
    hits |= (less(a, limit) | (less(b, limit) << W)) << u;
  }
  while (hits) {
    const int32_t code = id[__builtin_ctz(hits)];
    hits &= hits - 1;
    if (code != skip) evaluate(s, code);
  }
}

// Which of 16 boxes lie nearer than the limit.
template <int kWidth>
inline uint32_t near_boxes(const float* low, const float* high, const float* allowance, const PanelQuery* query, float limit) {
  uint32_t near = 0;
  for (int u = 0; u < kPanelGroup; u += W) {
    V acc = sub(set(0), load(allowance + u));
#pragma GCC unroll 17
    for (int j = 0; j < kWidth; ++j) {
      const V q = set(query->coordinate[j]);
      const V out = max(max(sub(load(low + j * kPanelGroup + u), q), sub(q, load(high + j * kPanelGroup + u))), set(0));
      acc = fma(out, out, acc);
    }
    near |= less(acc, set(limit)) << u;
  }
  return near;
}

template <int kWidth>
inline void visit_panels(Search& s, int32_t first, int32_t skip, PanelCounts* counts) {
  const PanelPlan& plan = s.plan;
  const int64_t box = (int64_t)kWidth * kPanelGroup;
  for (int64_t block = 0; block * kPanelGroup < plan.groups_count; ++block) {
    uint32_t groups = near_boxes<kWidth>(plan.group_low + block * box, plan.group_high + block * box,
                                         plan.group_allowance + block * kPanelGroup, s.query, s.box_limit);
    while (groups) {
      const int64_t group = block * kPanelGroup + __builtin_ctz(groups);
      groups &= groups - 1;
      ++counts->groups;
      uint32_t panels = near_boxes<kWidth>(plan.low + group * box, plan.high + group * box,
                                           plan.allowance + group * kPanelGroup, s.query, s.box_limit);
      while (panels) {
        const int64_t panel = group * kPanelGroup + __builtin_ctz(panels);
        panels &= panels - 1;
        if (panel == first) continue;
        ++counts->panels;
        screen_panel<kWidth>(s, panel, skip);
      }
    }
  }
}

constexpr int kPending = 16;  // rows whose candidates are settled together

template <int kWidth>
void search_panels(const PanelPlan& plan, const ExactCodes& e, const float* exact_rows, int64_t exact_ld, const float* rows,
                   int64_t ld, const PanelQuery* queries, const int32_t* order, const int32_t* first_panel,
                   const int64_t* guess, int64_t n, double* score, int64_t* index, PanelCounts* counts) {
  Row pending[kPending];
  int32_t previous = -1;
  for (int64_t i0 = 0; i0 < n; i0 += kPending) {
    const int m = n - i0 < kPending ? (int)(n - i0) : kPending;
    for (int i = 0; i < m; ++i) {
      const int64_t r = order[i0 + i];
      Row* row = &pending[i];
      row->exact = exact_rows + r * exact_ld;
      row->best = __builtin_inf();
      row->index = INT64_MAX;
      row->count = 0;
      Search s{plan, e, rows + r * ld, queries + r, row, __builtin_huge_valf(), 0, 0, -1, 0};
      set_limits(s);
      const int32_t warm = guess ? (int32_t)guess[r] : previous;
      if (warm >= 0) evaluate(s, warm);
      ++counts->panels;
      screen_panel<kWidth>(s, first_panel[r], warm);
      visit_panels<kWidth>(s, first_panel[r], warm, counts);
      compact(row, s.upper * (1.0f + 2e-7f) + plan.tiny);
      counts->evaluations += s.evaluations;
      counts->candidates += row->count;
      previous = s.nearest;
    }
    settle_rows(e, pending, m);
    for (int i = 0; i < m; ++i) {
      score[order[i0 + i]] = pending[i].best;
      index[order[i0 + i]] = pending[i].index;
    }
  }
  counts->rows += n;
}

void panels(const PanelPlan& plan, const ExactCodes& e, const float* exact_rows, int64_t exact_ld, const float* rows, int64_t ld,
            const PanelQuery* queries, const int32_t* order, const int32_t* first_panel, const int64_t* guess, int64_t n,
            double* score, int64_t* index, PanelCounts* counts) {
  switch (plan.width) {
    case 5:
      return search_panels<5>(plan, e, exact_rows, exact_ld, rows, ld, queries, order, first_panel, guess, n, score, index, counts);
    case 9:
      return search_panels<9>(plan, e, exact_rows, exact_ld, rows, ld, queries, order, first_panel, guess, n, score, index, counts);
    default:
      return search_panels<17>(plan, e, exact_rows, exact_ld, rows, ld, queries, order, first_panel, guess, n, score, index, counts);
  }
}

// ---- preparation -------------------------------------------------------------------------------------------------------------

// Coordinates of a centred row, four directions at a time so that the row is read few times.
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

void project(const float* row, const float* centre, const float* basis, int64_t ld_basis, int directions, int64_t dim,
             float rest_rel, PanelQuery* out) {
  const float norm = full_distance(row, centre, dim);
  float kept = 0;
  for (int j = 0; j < directions; ++j) {
    const float y = direction_dot(row, centre, basis + j * ld_basis, dim);
    out->coordinate[j] = y;
    kept += y * y;
  }
  const float rest = norm * (1.0f + rest_rel) - kept;
  out->coordinate[directions] = rest > 0 ? __builtin_sqrtf(rest) * (1.0f + 5e-7f) : 0.0f;
  out->norm = norm;
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
  int64_t d = 0;
  uint64_t h[4] = {0x9E3779B97F4A7C15ull, 0xBF58476D1CE4E5B9ull, 0x94D049BB133111EBull, 0xD6E8FEB86659FD93ull};
  float values[W];
  for (; d < dim; d += W) {
    const int n = dim - d < W ? (int)(dim - d) : W;
    const V v = add(n == W ? load(row + d) : load_part(row + d, n), set(0));  // -0 becomes +0
    good = good && all_finite(v);
    store(values, v);
    uint64_t word;
    for (int i = 0; i < W; i += 2) {
      __builtin_memcpy(&word, values + i, 8);
      h[(i / 2) & 3] = (h[(i / 2) & 3] ^ word) * 0x9FB21C651E98DF25ull;
      h[(i / 2) & 3] ^= h[(i / 2) & 3] >> 29;
    }
  }
  *finite = good;
  return h[0] ^ (h[1] << 1 | h[1] >> 63) ^ (h[2] << 2 | h[2] >> 62) ^ (h[3] << 3 | h[3] >> 61);
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
