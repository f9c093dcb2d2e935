// The search kernels of one SIMD level, written over the vectors of lanes_*.h. Each level includes this file once, inside an
// anonymous namespace: nothing inline here may be shared with code built for another target, and nothing of std:: is used.
//
// Every test that discards a code is a proved lower bound (docs/SEARCH.md); what survives is settled by the contract's formula.

constexpr int kUnit = 2 * W;  // codes that one pass over the coordinates scores

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

#include "search_panels.h"

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

inline void direction_sums(const V (&y)[4], float* out) { four_sums(y, out); }
inline void direction_sums(const V (&y)[8], float* out) { eight_sums(y, out); }

template <int kDirections>
inline void project_row(const float* row, const float* centre, const float* directions, int64_t dim, float rest_rel, PanelQuery* out) {
  V square = set(0), y[kDirections];
#pragma GCC unroll 8
  for (int j = 0; j < kDirections; ++j) y[j] = set(0);
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    const V x = sub(load(row + d), load(centre + d));
    square = fma(x, x, square);
#pragma GCC unroll 8
    for (int j = 0; j < kDirections; ++j) y[j] = fma(x, load(directions + j * dim + d), y[j]);
  }
  if (d < dim) {
    const int n = (int)(dim - d);
    const V x = sub(load_part(row + d, n), load_part(centre + d, n));
    square = fma(x, x, square);
#pragma GCC unroll 8
    for (int j = 0; j < kDirections; ++j) y[j] = fma(x, load_part(directions + j * dim + d, n), y[j]);
  }
  direction_sums(y, out->coordinate);
  float kept = 0;
#pragma GCC unroll 8
  for (int j = 0; j < kDirections; ++j) kept += out->coordinate[j] * out->coordinate[j];
  const float norm = sum(square), rest = norm * (1.0f + rest_rel) - kept;
  const float length = rest > 0 ? __builtin_sqrtf(rest) * (1.0f + 5e-7f) : 0.0f;
  const float total = kept + length * length;
  out->coordinate[kDirections] = length;
  out->norm = norm;
  out->excess = total > norm ? total - norm : 0.0f;
}

void project(const float* rows, int64_t ld, int64_t n, const float* centre, const float* directions, int count, int64_t dim,
             float rest_rel, PanelQuery* out) {
  constexpr int64_t kAhead = 8;  // rows come from memory for the first time here; a fetch past the last one does nothing
  const int64_t bytes = (dim < 256 ? dim : 256) * 4;
  for (int64_t i = 0; i < n; ++i) {
    fetch(rows + (i + kAhead) * ld, bytes);
    if (count == 4) project_row<4>(rows + i * ld, centre, directions, dim, rest_rel, out + i);
    else project_row<8>(rows + i * ld, centre, directions, dim, rest_rel, out + i);
  }
}

void round_to_grid(float per_unit, int directions, PanelQuery* points, int64_t n) {
  constexpr int kPlaces = (2 * kMaxPairs + W - 1) / W * W;
  int16_t rounded[kPlaces];
  const V most = set((float)kGrid), least = set(-(float)kGrid), scale = set(per_unit);
  for (int64_t i = 0; i < n; ++i) {
    for (int j = 0; j < kPlaces; j += W) {  // places after the coordinates hold 0
      const int left = directions + 1 - j;
      const V at = left >= W ? load(points[i].coordinate + j) : load_part(points[i].coordinate + j, left > 0 ? left : 0);
      store_rounded(rounded + j, max(min(mul(at, scale), most), least));
    }
    __builtin_memcpy(points[i].grid, rounded, sizeof(points[i].grid));
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
  uint64_t lanes[W / 2];
  hash_store(reinterpret_cast<uint32_t*>(lanes), hash);
  for (int i = 2; i < W / 2; ++i) lanes[i % 2] ^= lanes[i];  // they differ in how they started
  uint64_t total = (lanes[0] ^ 0x9E3779B97F4A7C15ull) * 0x9FB21C651E98DF25ull;
  total = ((total ^ total >> 31) + lanes[1]) * 0x9FB21C651E98DF25ull;
  return total ^ total >> 31;
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

#include "search_few.h"
#include "search_bytes.h"

constexpr Kernels kTable = {W,       kRows,            kThird, kOpsPerTerm,  dense,   bytes_or_null, to_bytes_or_null, few, settle_rows, panels,
                            project, round_to_grid, apply_covariance, inspect, centred_norm, accumulate};
