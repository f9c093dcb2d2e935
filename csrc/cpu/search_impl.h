// The search kernels of one SIMD level, written over the vectors of lanes_*.h. Each level includes this file once, inside an
// anonymous namespace: nothing inline here may be shared with code built for another target, and nothing of std:: is used.
//
// Every test that discards a code is a proved lower bound (docs/SEARCH.md); what survives is settled by the contract's formula.

constexpr int kUnit = 2 * W;  // codes that one pass over the coordinates scores

// The first n of W values, zeros in the place of the others.
inline V load_n(const float* p, int64_t n) { return n < W ? load_part(p, (int)n) : load(p); }
inline void store_n(float* p, V a, int64_t n) {
  if (n < W) store_part(p, a, (int)n);
  else store(p, a);
}

// ---- candidates --------------------------------------------------------------------------------------------------------------

// Sums of kBatch pairs at a time: terms by vectors, then kBatch independent chains of additions in ascending d.
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

inline void pair_sums(const ExactCodes& e, const float* const* x, const int32_t* code, double* total) {
  double terms[kBatch][kTerms];
  double sum[kBatch] = {};
  for (int64_t d0 = 0; d0 < e.dim; d0 += kTerms) {
    const int64_t len = e.dim - d0 < kTerms ? e.dim - d0 : kTerms;
    for (int j = 0; j < kBatch; ++j)
      pair_terms(x[j] + d0, e.codes + (int64_t)code[j] * e.ld + d0, len, e.metric == kL2, terms[j]);
    for (int64_t i = 0; i < len; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kBatch; ++j) sum[j] += terms[j][i];
    }
  }
  for (int j = 0; j < kBatch; ++j) total[j] = sum[j];
}

// norm: of the code, for cosine.
inline double score_of(const ExactCodes& e, double total, double norm) {
  if (e.metric == kL2) return total;
  if (e.metric == kDot) return -total;
  return norm > 0.0 ? -(total / __builtin_sqrt(norm)) : 0.0;
}

inline void offer(Row* row, double score, int32_t code) {
  if (score < row->best || (score == row->best && code < row->index)) {
    row->best = score;
    row->index = code;
  }
}

// The first n pairs of a batch, each offered to the row it belongs to; the others hold pairs as well, of no account.
inline void settle_batch(const ExactCodes& e, const float* const* x, const int32_t* code, Row* const* owner, int n) {
  double total[kBatch], norm[kBatch] = {};
  pair_sums(e, x, code, total);
  if (e.metric == kCosine && e.norm) {
    for (int j = 0; j < n; ++j) norm[j] = e.norm[code[j]];
  } else if (e.metric == kCosine) {
    const float* c[kBatch];
    for (int j = 0; j < kBatch; ++j) c[j] = e.codes + (int64_t)code[j] * e.ld;
    pair_sums(e, c, code, norm);
  }
  for (int j = 0; j < n; ++j) offer(owner[j], score_of(e, total[j], norm[j]), code[j]);
}

void settle_rows(const ExactCodes& e, Row* rows, int row_count) {
  const float* x[kBatch];
  int32_t code[kBatch];
  Row* owner[kBatch];
  int n = 0;
  for (int r = 0; r < row_count; ++r) {
    for (int i = 0; i < rows[r].count; ++i) {
      x[n] = rows[r].exact;
      code[n] = rows[r].candidate[i];
      owner[n++] = &rows[r];
      if (n == kBatch) {
        settle_batch(e, x, code, owner, n);
        n = 0;
      }
    }
    rows[r].count = 0;
  }
  if (n == 0) return;
  for (int j = n; j < kBatch; ++j) x[j] = x[0], code[j] = code[0];
  settle_batch(e, x, code, owner, n);
}

// Drop candidates whose lower bound is no longer under the limit.
inline void compact(Row* row, float limit) {
  int kept = 0;
  for (int i = 0; i < row->count; ++i) {
    const float score = row->score[i];
    row->candidate[kept] = row->candidate[i];
    row->score[kept] = score;
    kept += score < limit;
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

// ---- the end -----------------------------------------------------------------------------------------------------------------

constexpr int kPairs = 4;  // distances that are computed side by side

// A row, or its start, on its way into the second-level cache: what waits together may be more than the first holds.
inline void fetch(const float* row, int64_t dim) {
  for (int64_t d = 0; d < (dim < 256 ? dim : 256); d += 16) __builtin_prefetch(row + d, 0, 2);
}

// Squared distances of kPairs pairs in float64, in an order of our own.
inline void double_distances(const float* const* x, const float* const* c, int64_t dim, double* out) {
  const double zeros[WD] = {};
  D total[kPairs];
#pragma GCC unroll 4
  for (int j = 0; j < kPairs; ++j) total[j] = dload(zeros);
  int64_t d = 0;
  for (; d + WD <= dim; d += WD) {
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      const D t = dsub(widen(x[j] + d), widen(c[j] + d));
      total[j] = dfma(t, t, total[j]);
    }
  }
  for (int j = 0; j < kPairs; ++j) out[j] = dsum(total[j]);
  for (; d < dim; ++d) {
    for (int j = 0; j < kPairs; ++j) {
      const double t = (double)x[j][d] - (double)c[j][d];
      out[j] += t * t;
    }
  }
}

// Leaves rows the candidates that the formula may choose. A row with one has its code, and its distance is the formula's rounded to
// float32: nearly always a sum in any order shows what that is. Then the formula's own order, one addition after the other, is not needed.
// Takes some of the rows; returns how many.
inline int shortlist(const ExactCodes& e, Row* rows, int row_count) {
  constexpr int kSome = 2 * kCandidates;
  const float *x[kSome + kPairs], *c[kSome + kPairs];
  alignas(64) double square[kSome + kPairs];
  int n = 0, taken = 0;
  for (; taken < row_count && n + rows[taken].count <= kSome; ++taken) {
    for (int i = 0; i < rows[taken].count; ++i, ++n) {
      x[n] = rows[taken].exact;
      c[n] = e.codes + (int64_t)rows[taken].candidate[i] * e.ld;
      fetch(c[n], e.dim);
    }
  }
  for (int i = n; n && i < n + kPairs; ++i) x[i] = x[0], c[i] = c[0];
  for (int i = 0; i < n; i += kPairs) double_distances(x + i, c + i, e.dim, square + i);
  const double error = (double)(e.dim + 16) * 0x1p-52;
  const double* of_row = square;
  for (Row* row = rows; row < rows + taken; ++row) {
    double least = row->best;  // +inf, or what was settled before
    for (int i = 0; i < row->count; ++i) least = of_row[i] < least ? of_row[i] : least;
    int kept = 0;
    double last = 0;
    for (int i = 0; i < row->count; ++i) {
      row->candidate[kept] = row->candidate[i];
      const bool near = of_row[i] * (1.0 - error) <= least * (1.0 + error);
      last = near ? of_row[i] : last;
      kept += near;
    }
    of_row += row->count;
    row->count = kept;
    const float lowest = (float)(last * (1.0 - error)), highest = (float)(last * (1.0 + error));
    if (kept != 1 || row->index != INT64_MAX || lowest != highest || highest == __builtin_inff()) continue;
    row->best = last;
    row->index = row->candidate[0];
    row->count = 0;
  }
  return taken;
}

// Settles rows that nothing is compared with after this: of their scores only the float32 counts.
void finish_search(const ExactCodes& e, Row* rows, int row_count) {
  for (int r = 0; e.metric == kL2 && r < row_count;) r += shortlist(e, rows + r, row_count - r);
  settle_rows(e, rows, row_count);
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
        for (int r = 0; r < kRows; ++r) under |= (uint32_t)(less(min(a[r], b[r]), set(limit[r])) != 0) << r;
        if (__builtin_expect(under != 0, 0)) {
          const int64_t at = p * kPanel + u;
          alignas(64) float scores[kRows][kUnit];
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) store(scores[r], a[r]), store(scores[r] + W, b[r]);
          for (; under; under &= under - 1) {
            const int r = __builtin_ctz(under);
            collect(e, &rows[t * kRows + r], &limit[r], load(scores[r]), load(scores[r] + W), plan.slack + at, plan.id + at);
          }
        }
      }
    }
  }
  for (int64_t r = 0; r < tile_count * kRows; ++r) compact(&rows[r], limits[r]);
  finish_search(e, rows, (int)(tile_count * kRows));
}

void to_tile(const float* const* rows, const float* centre, int64_t dim, float* tile, float* square) {
  static_assert(kRows <= W && W <= kMostTileRows, "a lane for each row");
  V total[4] = {set(0), set(0), set(0), set(0)}, x[W];
  for (int64_t d = 0; d < dim; d += W) {
    const V origin = load_n(centre + d, dim - d);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) x[r] = r < kRows ? sub(load_n(rows[r < kRows ? r : 0] + d, dim - d), origin) : origin;
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (d + i == dim) break;
      total[i % 4] = fma(x[i], x[i], total[i % 4]);
      store(tile + (d + i) * kRows, x[i]);  // the next one overwrites lanes that are not rows
    }
  }
  alignas(64) float sums[W];
  store(sums, add(add(total[0], total[1]), add(total[2], total[3])));
  for (int r = 0; r < kRows; ++r) square[r] = sums[r];
}

#include "search_panels.h"

// ---- preparation -------------------------------------------------------------------------------------------------------------

// Points of up to W rows: a block of them is turned around, so that each lane is a row and no sum runs across lanes.
template <int kCoordinates>
inline void project_rows(const PanelPlan& plan, const float* rows, int64_t ld, int n, PanelQuery* out) {
  const float* row[W];
  for (int r = 0; r < W; ++r) row[r] = rows + (r < n ? r : n - 1) * ld;
  // The last one is the square. No sum runs over more than kProjected dimensions, so that its allowance does not weaken the screen.
  V at[kCoordinates], total[kCoordinates];
  for (int j = 0; j < kCoordinates; ++j) at[j] = total[j] = set(0);
  const auto add_up = [&] {
    for (int j = 0; j < kCoordinates; ++j) total[j] = add(total[j], at[j]), at[j] = set(0);
  };
  const auto block = [&](int64_t d, int count, auto read) {
    if (d > 0 && d % kProjected == 0) add_up();
    const V centre = read(plan.centre + d);
    V x[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      x[r] = sub(read(row[r] + d), centre);
      // Rows come from memory for the first time here, into the second-level cache: wide ones would leave no room in the first. Past the
      // last row it does nothing.
      __builtin_prefetch(row[r] + W * ld + d, 0, 2);
    }
    transpose(x);
    const float* directions = plan.basis + d * (kCoordinates - 1);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i == count) break;
      at[kCoordinates - 1] = fma(x[i], x[i], at[kCoordinates - 1]);
#pragma GCC unroll 16
      for (int j = 0; j < kCoordinates - 1; ++j) at[j] = fma(x[i], set(directions[i * (kCoordinates - 1) + j]), at[j]);
    }
  };
  int64_t d = 0;
  for (; d + W <= plan.dim; d += W) block(d, W, [](const float* p) { return load(p); });
  if (d < plan.dim) block(d, (int)(plan.dim - d), [n = (int)(plan.dim - d)](const float* p) { return load_part(p, n); });
  if (plan.dim > kProjected) {
    add_up();
    for (int j = 0; j < kCoordinates; ++j) at[j] = total[j];
  }
  V kept = set(0);
  for (int j = 0; j < kCoordinates - 1; ++j) kept = fma(at[j], at[j], kept);
  const V norm = at[kCoordinates - 1], rest = max(sub(mul(norm, set(1.0f + plan.rest_rel)), kept), set(0));
  const V length = at[kCoordinates - 1] = mul(root(rest), set(1.0f + 5e-7f));
  const V excess = max(sub(fma(length, length, kept), norm), set(0));

  // What lies farther out is drawn in to the ball that points are held in.
  const V scale = min(div(set((float)kGrid), root(add(kept, rest))), set(plan.per_unit));
  constexpr int kFields = sizeof(PanelQuery) / 4, kWords = kMaxCoordinates / 2;  // words of a point, and those of its coordinates
  static_assert(__builtin_offsetof(PanelQuery, norm) == 4 * kWords && __builtin_offsetof(PanelQuery, excess) == 4 * kWords + 4,
                "coordinates, norm and excess");
  V field[kFields + W];
  for (int j = 0; j < kFields + W; ++j) field[j] = set(0);
  for (int j = 0; j < kCoordinates; j += 2) {
    field[j / 2] = as_floats(pair_up(to_steps(mul(at[j], scale)), to_steps(mul(at[j + 1], scale))));
  }
  field[kWords] = norm;
  field[kWords + 1] = excess;
  alignas(64) float fields[W][(kFields + W - 1) / W * W];
  for (int first = 0; first < kFields; first += W) {
    transpose(field + first);
    for (int r = 0; r < W; ++r) store(fields[r] + first, field[first + r]);
  }
  for (int r = 0; r < n; ++r) __builtin_memcpy(out + r, fields[r], sizeof(PanelQuery));
}

void project(const PanelPlan& plan, const float* rows, int64_t ld, int64_t n, PanelQuery* out) {
  const auto some_rows = plan.coordinates == 4 ? project_rows<4> : plan.coordinates == 10 ? project_rows<10> : project_rows<12>;
  static_assert(kMaxCoordinates == 12, "the largest of them");
  for (int64_t i = 0; i < n; i += W) some_rows(plan, rows + i * ld, ld, n - i < W ? (int)(n - i) : W, out + i);
}

// Of four directions and kSampleRows rows, so that directions and images are read once for all of those.
constexpr int kSampleRows = 4;
inline void apply_covariance_to(const float* const* row, const float* centre, const float* basis, int64_t dim, float* out) {
  V y[kSampleRows][4], x[kSampleRows];
  const auto centred = [&](int64_t d) {
#pragma GCC unroll 4
    for (int r = 0; r < kSampleRows; ++r) x[r] = sub(load_n(row[r] + d, dim - d), load_n(centre + d, dim - d));
  };
#pragma GCC unroll 4
  for (int r = 0; r < kSampleRows; ++r) y[r][0] = y[r][1] = y[r][2] = y[r][3] = set(0);
  for (int64_t d = 0; d < dim; d += W) {
    centred(d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V direction = load_n(basis + i * dim + d, dim - d);
#pragma GCC unroll 4
      for (int r = 0; r < kSampleRows; ++r) y[r][i] = fma(x[r], direction, y[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kSampleRows; ++r) {
    float sums[4];
    four_sums(y[r], sums);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) y[r][i] = set(sums[i]);
  }
  for (int64_t d = 0; d < dim; d += W) {
    centred(d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      V image = load_n(out + i * dim + d, dim - d);
#pragma GCC unroll 4
      for (int r = 0; r < kSampleRows; ++r) image = fma(y[r][i], x[r], image);
      store_n(out + i * dim + d, image, dim - d);
    }
  }
}

void apply_covariance(const float* const* rows, int64_t n, const float* centre, const float* basis, int directions, int64_t dim,
                      float* out) {
  for (int64_t first = 0; first < n; first += kSampleRows) {
    const float* row[kSampleRows];
    for (int r = 0; r < kSampleRows; ++r) row[r] = first + r < n ? rows[first + r] : centre;  // which adds nothing
    for (int j = 0; j < directions; j += 4) apply_covariance_to(row, centre, basis + j * dim, dim, out + j * dim);
  }
}

uint64_t inspect(const float* row, int64_t dim, bool* finite) {
  bool good = true;
  H hash = hash_start();
  for (int64_t d = 0; d < dim; d += W) {
    const V v = add(load_n(row + d, dim - d), set(0));  // -0 becomes +0
    good = good && all_finite(v);
    hash = hash_mix(hash, v);
  }
  *finite = good;
  uint64_t lanes[W / 2];
  hash_store(reinterpret_cast<uint32_t*>(lanes), hash);
  for (int i = 2; i < W / 2; ++i) lanes[i % 2] ^= lanes[i];  // they differ in how they started
  uint64_t total = (lanes[0] ^ 0x9E3779B97F4A7C15ull) * 0x9FB21C651E98DF25ull;
  total = ((total ^ total >> 31) + lanes[1]) * 0x9FB21C651E98DF25ull;
  return total ^ total >> 31;
}

double centred_norm(const float* row, const float* centre, int64_t dim) {
  const double zeros[WD] = {};
  D total = dload(zeros);
  int64_t d = 0;
  for (; d + WD <= dim; d += WD) {
    const D t = dsub(widen(row + d), widen(centre + d));
    total = dfma(t, t, total);
  }
  double square = dsum(total);
  for (; d < dim; ++d) {
    const double t = (double)row[d] - (double)centre[d];
    square += t * t;
  }
  return square;
}

void accumulate(double* total, const float* row, int64_t dim) {
  int64_t d = 0;
  for (; d + WD <= dim; d += WD) dstore(total + d, dadd(dload(total + d), widen(row + d)));
  for (; d < dim; ++d) total[d] += (double)row[d];
}

#include "search_few.h"
#include "search_bytes.h"

constexpr Kernels kTable = {W,           kRows,    kThird,           kOpsPerTerm,      kPairCost, dense,        bytes_or_null,
                            to_tile,     to_bytes_or_null, few,      settle_rows,      panels,    project,      apply_covariance,
                            inspect,     centred_norm,     accumulate};
