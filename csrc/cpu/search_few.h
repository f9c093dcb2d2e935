// Few rows against a codebook as it lies in memory, at one SIMD level; included by search_impl.h.
//
// Codes pass by in panels of 32, once for all rows: centred, scored, forgotten. With several rows a panel is turned around in
// registers, so that the dense road's inner loop can take it; for a handful of rows that costs more than it saves, and inner products
// are taken along the coordinates. Scores, limits and candidates are those of the dense road (docs/SEARCH.md).

constexpr int kDirect = 4;                     // rows that are multiplied with a code together, along the coordinates
constexpr int kBeside = W == 16 ? 4 : 2;       // codes beside each other there: kDirect * kBeside sums fill the registers
constexpr int kThird = kRows > 4 ? kRows / 3 : 2;  // rows of the narrowest tile

// What is known of a panel's codes once they have been read.
struct FewPanel {
  const float* row[kPanel];  // codes as given; past the end the last one again
  float factor[kPanel];      // 1 / |c| for cosine, else 1
  float square[kPanel];      // |c'|^2
  float start[kPanel], slack[kPanel];
  int32_t id[kPanel];
  bool sound[kPanel];        // cosine: the factor exists
};


inline float square_of(const float* row, int64_t dim) {
  V s0 = set(0), s1 = set(0);
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) {
    s0 = fma(load(row + d), load(row + d), s0);
    s1 = fma(load(row + d + W), load(row + d + W), s1);
  }
  for (; d < dim; d += W) {
    const V v = load_n(row + d, dim - d < W ? (int)(dim - d) : W);
    s0 = fma(v, v, s0);
  }
  return sum(add(s0, s1));
}

inline void open_panel(const FewPlan& plan, const ExactCodes& e, int64_t first, FewPanel* p) {
  for (int i = 0; i < kPanel; ++i) {
    const int64_t code = first + i < plan.count ? first + i : plan.count - 1;
    p->id[i] = (int32_t)code;
    p->row[i] = e.codes + code * e.ld;
    p->factor[i] = 1.0f;
    p->sound[i] = true;
    if (!plan.unit) continue;
    const float square = square_of(p->row[i], e.dim);
    p->sound[i] = square > 0x1p-60f && square < 0x1p100f;  // not for NaN
    p->factor[i] = p->sound[i] ? 1.0f / __builtin_sqrtf(square) : 0.0f;
  }
}

// Centred codes [dim, 32] as the dense road reads them, and their squares.
template <bool kUnitVectors>
inline void turn_panel(const float* shift, int64_t dim, float* values, FewPanel* p) {
  for (int u = 0; u < kPanel; u += W) {
    V square[2] = {set(0), set(0)};
    for (int64_t d = 0; d < dim; d += W) {
      const int n = dim - d < W ? (int)(dim - d) : W;
      V v[W];
      const V origin = load_n(shift + d, n);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const V code = load_n(p->row[u + i] + d, n);
        v[i] = kUnitVectors ? fma(code, set(p->factor[u + i]), origin) : add(code, origin);
      }
      transpose(v);
      float* to = values + d * kPanel + u;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        square[i % 2] = fma(v[i], v[i], square[i % 2]);
        if (i < n) store(to + i * kPanel, v[i]);
      }
    }
    store(p->square + u, add(square[0], square[1]));
  }
}

// Inner products of kN rows with the panel's codes, [kN, 32], and the codes' squares.
template <int kN>
inline void multiply(const float* shift, const float* rows, int64_t dim, float* out, FewPanel* p) {
  for (int u = 0; u < kPanel; u += kBeside) {
    V total[kN][kBeside], square[kBeside];
    for (int j = 0; j < kBeside; ++j) {
      square[j] = set(0);
      for (int r = 0; r < kN; ++r) total[r][j] = set(0);
    }
    for (int64_t d = 0; d < dim; d += W) {
      const int n = dim - d < W ? (int)(dim - d) : W;
      const V origin = load_n(shift + d, n);
      V code[kBeside];
#pragma GCC unroll 4
      for (int j = 0; j < kBeside; ++j) {
        code[j] = fma(load_n(p->row[u + j] + d, n), set(p->factor[u + j]), origin);
        square[j] = fma(code[j], code[j], square[j]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kN; ++r) {
        const V x = load_n(rows + r * dim + d, n);
#pragma GCC unroll 4
        for (int j = 0; j < kBeside; ++j) total[r][j] = fma(x, code[j], total[r][j]);
      }
    }
    for (int j = 0; j < kBeside; ++j) {
      p->square[u + j] = sum(square[j]);
      for (int r = 0; r < kN; ++r) out[r * kPanel + u + j] = sum(total[r][j]);
    }
  }
}

inline void multiply_rows(const float* shift, const float* rows, int n, int64_t dim, float* out, FewPanel* p) {
  switch (n) {
    case 1: return multiply<1>(shift, rows, dim, out, p);
    case 2: return multiply<2>(shift, rows, dim, out, p);
    case 3: return multiply<3>(shift, rows, dim, out, p);
    default: return multiply<4>(shift, rows, dim, out, p);
  }
}

// What the rows collected.
struct FewHits {
  int64_t count;  // candidates that wait, at most
  bool full;      // a row could not hold its own
  bool zero;      // a code of zeros has come by
};

inline bool equal_codes(const ExactCodes& e, int32_t a, int32_t b) {
  const float *x = e.codes + (int64_t)a * e.ld, *y = e.codes + (int64_t)b * e.ld;
  constexpr uint32_t kAll = (uint32_t)((1ull << W) - 1);
  for (int64_t d = 0; d < e.dim; d += W) {
    const int n = e.dim - d < W ? (int)(e.dim - d) : W;
    if (equal(load_n(x + d, n), load_n(y + d, n)) != kAll) return false;
  }
  return true;
}

// Whether a code equals one that waits for the row: equal codes have equal scores, so it would be there.
inline bool is_repeated(const ExactCodes& e, const Row& row, int32_t code, float score) {
  for (int j = 0; j < row.count; ++j)
    if (row.score[j] == score && equal_codes(e, row.candidate[j], code)) return true;
  return false;
}

inline void keep(Row* row, int32_t code, float score, float limit, FewHits* hits) {
  if (row->count == kCandidates) compact(row, limit);
  if (row->count == kCandidates) {
    hits->full = true;
    return;
  }
  row->candidate[row->count] = code;
  row->score[row->count++] = score;
  ++hits->count;
}

// As collect() of the dense road, for the codes from `u` on, but nothing is settled on the way. A code that equals one before it is
// taken out of the panel, so that the rows that follow do not meet it: codes come in ascending order, and the lowest wins.
__attribute__((noinline)) void keep_hits(const ExactCodes& e, FewPanel* p, int u, Row* row, float* row_limit, V a, V b, FewHits* hits) {
  const V upper = min(add(a, load(p->slack + u)), add(b, load(p->slack + u + W)));
  float limit = smallest(upper) + 2.0f * row->slack;
  limit = limit < *row_limit ? limit : *row_limit;
  *row_limit = limit;
  float scores[kUnit];
  store(scores, a);
  store(scores + W, b);
  const V bound = set(limit);
  uint32_t under = less(a, bound) | (less(b, bound) << W);
  while (under) {
    const int lane = __builtin_ctz(under);
    under &= under - 1;
    float* start = &p->start[u + lane];
    if (*start == __builtin_inff()) continue;
    if (is_repeated(e, *row, p->id[u + lane], scores[lane])) *start = __builtin_inff();
    else keep(row, p->id[u + lane], scores[lane], limit, hits);
  }
}

// Counts the candidates that wait, once those that are no longer under their row's limit are gone.
inline void recount(Row* rows, const float* limits, int64_t n, FewHits* hits) {
  hits->count = 0;
  for (int64_t r = 0; r < n; ++r) {
    compact(&rows[r], limits[r]);
    hits->count += rows[r].count;
  }
}

inline bool is_zero(const float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d)
    if (row[d] != 0.0f) return false;
  return true;
}

// Starts and slacks from the squares. Some codes take no part: those that are not finite, those past the end, and those so large that
// l2 cannot choose them; the other metrics can, so every row keeps those for the formula. `lines` [lines_count, 32] is what will be
// subtracted from the starts, and must be finite.
inline void close_panel(const FewPlan& plan, const ExactCodes& e, FewPanel* p, float* lines, int64_t lines_count, const float* limits,
                        Row* rows, int64_t n, FewHits* hits) {
  for (int i = 0; i < kPanel; ++i) {
    const float square = p->square[i];
    const bool padding = i > 0 && p->id[i] == p->id[i - 1];
    if (__builtin_expect(p->sound[i] && square < 0x1p100f && !padding, 1)) {
      p->start[i] = square * (plan.half - plan.of_code);
      p->slack[i] = square * (2.0f * plan.of_code);
      continue;
    }
    p->start[i] = __builtin_inff();
    p->slack[i] = 0.0f;
    for (int64_t d = 0; d < lines_count; ++d) lines[d * kPanel + i] = 0.0f;
    bool finite;
    inspect(p->row[i], e.dim, &finite);
    if (padding || !finite || e.metric == kL2) continue;
    if (plan.unit && is_zero(p->row[i], e.dim)) {  // all codes of zeros score 0: the lowest stands for them
      if (hits->zero) continue;
      hits->zero = true;
    }
    for (int64_t r = 0; r < n; ++r)
      if (limits[r] > -__FLT_MAX__) keep(&rows[r], p->id[i], -__FLT_MAX__, limits[r], hits);
  }
}

template <int kN>
inline void score_tile(const ExactCodes& e, FewPanel* p, const float* values, const float* tile, float* limits, Row* rows, FewHits* hits) {
  for (int u = 0; u < kPanel; u += kUnit) {
    V a[kN], b[kN];
    score_unit(values + u, p->start + u, tile, e.dim, a, b);
    uint32_t under = 0;
#pragma GCC unroll 16
    for (int r = 0; r < kN; ++r) under |= less(min(a[r], b[r]), set(limits[r]));
    if (__builtin_expect(under == 0, 1)) continue;
#pragma GCC unroll 16
    for (int r = 0; r < kN; ++r)
      if (less(min(a[r], b[r]), set(limits[r]))) keep_hits(e, p, u, &rows[r], &limits[r], a[r], b[r], hits);
  }
}

// Tiles of kRows rows and, for what is left over, one of a third or two thirds.
inline void score_rows(const ExactCodes& e, FewPanel* p, const float* values, const float* tiles, int64_t n, float* limits, Row* rows,
                       FewHits* hits) {
  const int64_t dim = e.dim;
  int64_t r = 0;
  for (; n - r > kRows - kThird; r += kRows) score_tile<kRows>(e, p, values, tiles + r * dim, limits + r, rows + r, hits);
  if (n - r > kThird) score_tile<2 * kThird>(e, p, values, tiles + r * dim, limits + r, rows + r, hits);
  else if (n > r) score_tile<kThird>(e, p, values, tiles + r * dim, limits + r, rows + r, hits);
}

inline void score_products(const ExactCodes& e, FewPanel* p, const float* products, float* limit, Row* row, FewHits* hits) {
  for (int u = 0; u < kPanel; u += kUnit) {
    const V a = sub(load(p->start + u), load(products + u)), b = sub(load(p->start + u + W), load(products + u + W));
    if (less(min(a, b), set(*limit))) keep_hits(e, p, u, row, limit, a, b, hits);
  }
}

// How many candidates were settled; -1: so many codes are as near as rounding can tell that they would cost more than all scores.
int64_t few(const FewPlan& plan, const ExactCodes& e, int64_t begin, int64_t end, const float* tiles, int64_t n, float* limits, Row* rows,
         float* scratch) {
  FewHits hits = {0, false, false};
  FewPanel panel;
  for (int64_t first = begin; first < end; first += kPanel) {
    open_panel(plan, e, first, &panel);
    if (plan.direct) {
      for (int64_t r = 0; r < n; r += kDirect)
        multiply_rows(plan.shift, tiles + r * e.dim, (int)(n - r < kDirect ? n - r : kDirect), e.dim, scratch + r * kPanel, &panel);
      close_panel(plan, e, &panel, scratch, n, limits, rows, n, &hits);
      for (int64_t r = 0; r < n; ++r) score_products(e, &panel, scratch + r * kPanel, &limits[r], &rows[r], &hits);
    } else {
      if (plan.unit) turn_panel<true>(plan.shift, e.dim, scratch, &panel);
      else turn_panel<false>(plan.shift, e.dim, scratch, &panel);
      close_panel(plan, e, &panel, scratch, e.dim, limits, rows, n, &hits);
      score_rows(e, &panel, scratch, tiles, n, limits, rows, &hits);
    }
    // Usually about two candidates a row wait. A decision by the formula costs some 50 scores.
    const int64_t waiting = n * 8 + n * (first + kPanel - begin) / 128;
    if (hits.count > waiting) recount(rows, limits, n, &hits);
    if (hits.full || hits.count > waiting) return -1;
  }
  recount(rows, limits, n, &hits);
  if (begin == 0 && end == plan.count) finish_search(e, rows, (int)n);
  else settle_rows(e, rows, (int)n);  // to be compared with what other threads found
  return hits.count;
}
