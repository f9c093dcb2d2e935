// The dense road in bytes. Included by search_impl.h; a level has it where one instruction adds four products of bytes.
#if defined(__AVX512VNNI__)

// Scores s, t of a panel's codes for kRows rows; the dots stay in registers from the first coordinate to the last. Codes carry 128 too much;
// -128 times the sum of a row takes it away.
inline __attribute__((always_inline)) void score_bytes(const BytePlan& plan, int64_t at, const int32_t* tile, const ByteRow* steps,
                                                       V (&s)[kRows], V (&t)[kRows]) {
  I a[kRows], b[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) a[r] = b[r] = iset(-128 * steps[r].sum);
  const int32_t* codes = plan.panels + at * plan.quads;
  for (int64_t q = 0; q < plan.quads; ++q) {
    const I c0 = iload(codes), c1 = iload(codes + W);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const I x = iset(tile[r]);
      add_byte_dots(a[r], c0, x);
      add_byte_dots(b[r], c1, x);
    }
    codes += kPanel;
    tile += kRows;
  }
  const V start0 = load(plan.start + at), start1 = load(plan.start + at + W);
  const V unit0 = load(plan.unit + at), unit1 = load(plan.unit + at + W);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const V unit = set(steps[r].unit);
    s[r] = fnma(mul(to_float(a[r]), unit0), unit, start0);
    t[r] = fnma(mul(to_float(b[r]), unit1), unit, start1);
  }
}

// By how much a row's scores are off at most, where codes have these errors and lengths. Rounding keeps order: larger ones give no less.
inline V off_by(const ByteRow& row, V error, V length) { return fma(set(row.length), error, mul(set(row.error), length)); }

// The largest of n values, none of which is negative.
inline V largest_of(const float* values, int64_t n) {
  V most = set(0);
  for (int64_t i = 0; i < n; i += W) most = max(most, load(values + i));
  return sub(set(0), set(smallest(sub(set(0), most))));
}

// A score that is not under it is not under the limit by its lower bound either, where scores are off by `most` at most: no code that it
// spares needs bounds of its own. The sum is raised by more than its two roundings. NaN, which no score is under, where the limit is -inf.
inline float reach_of(float limit, float most) {
  const float sum = limit + most;
  return sum + (sum < 0 ? -sum : sum) * 0x1p-22f;
}

// A row met scores s, t that may be a candidate's: its limit sinks to the smallest upper bound, and codes with a lower bound under it are kept.
// Returns how many had no place, and were settled or dropped at once.
__attribute__((noinline)) int64_t keep_under(const BytePlan& plan, int64_t at, const ExactCodes& e, const ByteRow& steps, Row* row,
                                             float* limit, V s, V t) {
  const V off0 = off_by(steps, load(plan.error + at), load(plan.length + at));
  const V off1 = off_by(steps, load(plan.error + at + W), load(plan.length + at + W));
  const float upper = smallest(min(add(s, off0), add(t, off1))) + 2.0f * row->slack;
  if (upper < *limit) *limit = upper;
  const V low0 = sub(s, off0), low1 = sub(t, off1), bound = set(*limit);
  uint32_t hits = less(low0, bound) | less(low1, bound) << W;
  if (!hits) return 0;
  alignas(64) float scores[kPanel];
  store(scores, low0);
  store(scores + W, low1);
  int64_t displaced = 0;
  for (; hits; hits &= hits - 1) {
    const int lane = __builtin_ctz(hits), before = row->count;
    append(e, row, plan.id[at + lane], scores[lane], *limit);
    if (row->count <= before) displaced += before;
  }
  return displaced;
}

int64_t bytes(const BytePlan& plan, const ExactCodes& e, const int32_t* tiles, const ByteRow* steps, int64_t tile_count, float* limits,
              Row* rows) {
  constexpr int64_t kTogether = 16;  // panels that a tile meets while its rows are at hand
  int64_t settled = 0;
  const V error = largest_of(plan.error, plan.panels_count * kPanel), length = largest_of(plan.length, plan.panels_count * kPanel);
  for (int64_t first = 0; first < plan.panels_count; first += kTogether) {
    const int64_t last = plan.panels_count - first < kTogether ? plan.panels_count : first + kTogether;
    for (int64_t tile = 0; tile < tile_count; ++tile) {
      const ByteRow* row = steps + tile * kRows;
      float *limit = limits + tile * kRows, most[kRows], reach[kRows];
      for (int r = 0; r < kRows; ++r) {
        most[r] = smallest(off_by(row[r], error, length));
        reach[r] = reach_of(limit[r], most[r]);
      }
      for (int64_t p = first; p < last; ++p) {
        V s[kRows], t[kRows];
        score_bytes(plan, p * kPanel, tiles + tile * plan.quads * kRows, row, s, t);
        uint32_t under = 0;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) under |= (uint32_t)(less(min(s[r], t[r]), set(reach[r])) != 0) << r;
        if (__builtin_expect(under == 0, 1)) continue;
        alignas(64) float scores[kRows][kPanel];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) store(scores[r], s[r]), store(scores[r] + W, t[r]);
        for (; under; under &= under - 1) {
          const int r = __builtin_ctz(under);
          settled += keep_under(plan, p * kPanel, e, row[r], &rows[tile * kRows + r], &limit[r], load(scores[r]), load(scores[r] + W));
          reach[r] = reach_of(limit[r], most[r]);
        }
      }
    }
  }
  for (int64_t r = 0; r < tile_count * kRows; ++r) {
    compact(&rows[r], limits[r]);
    settled += rows[r].count;
  }
  finish_search(e, rows, (int)(tile_count * kRows));
  return settled;
}

inline V centred(const float* row, const float* centre, int64_t d, int64_t dim) {
  if (dim - d >= W) return sub(load(row + d), load(centre + d));
  const int n = (int)(dim - d);
  return sub(load_part(row + d, n), load_part(centre + d, n));
}

ByteRow to_bytes(const float* row, const float* centre, int64_t dim, int32_t* out, int64_t stride) {
  V most = set(0), square = set(0), error = set(0);
  for (int64_t d = 0; d < dim; d += W) {
    const V v = centred(row, centre, d, dim);
    most = max(most, max(v, sub(set(0), v)));
    square = fma(v, v, square);
  }
  const float largest = -smallest(sub(set(0), most));
  ByteRow found = {largest > 1e-30f ? largest / 127.0f : 0.0f, 0, sum(square), 0.0f};
  const V unit = set(found.unit), per_unit = set(found.unit > 0 ? 127.0f / largest : 0.0f);
  I total = iset(0);
  for (int64_t d = 0; d < dim; d += W) {
    const V v = centred(row, centre, d, dim);
    const I steps = to_steps(min(max(mul(v, per_unit), set(-127)), set(127)));  // NaN becomes a number
    const V left = fnma(to_float(steps), unit, v);
    error = fma(left, left, error);
    total = iadd(total, steps);
    int32_t words[W / 4];
    store_bytes(words, steps);
    for (int64_t q = 0; q < W / 4 && d + 4 * q < dim; ++q) out[(d / 4 + q) * stride] = words[q];
  }
  found.sum = isum(total);
  found.error = sum(error);
  return found;
}

constexpr auto bytes_or_null = bytes;
constexpr auto to_bytes_or_null = to_bytes;

#else

constexpr decltype(Kernels::bytes) bytes_or_null = nullptr;
constexpr decltype(Kernels::to_bytes) to_bytes_or_null = nullptr;

#endif
