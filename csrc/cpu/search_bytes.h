// The dense road in bytes. Included by search_impl.h; a level has it where one instruction adds four products of bytes.
#if defined(__AVX512VNNI__)

// Scores of kUnit codes for kRows rows, row r's at to + r * kByteScores: the dots are held in registers from the first coordinate to the last.
// Codes carry 128 too much; -128 times the sum of a row takes it away.
inline __attribute__((always_inline)) void score_bytes(const BytePlan& plan, int64_t at, const int32_t* tile, const ByteRow* steps,
                                                       float* to) {
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
    store(to + r * kByteScores, fnma(mul(to_float(a[r]), unit0), unit, start0));
    store(to + r * kByteScores + W, fnma(mul(to_float(b[r]), unit1), unit, start1));
  }
}

// By how much a row's scores are off at most, where codes have these errors and lengths. None of its roundings changes an order: larger ones
// give no less.
inline V off_by(const ByteRow& row, V error, V length) { return fma(set(row.length), error, mul(set(row.error), length)); }

// The largest of n values, none of which is negative.
inline V largest_of(const float* values, int64_t n) {
  V most = set(0);
  for (int64_t i = 0; i < n; i += W) most = max(most, load(values + i));
  return sub(set(0), set(smallest(sub(set(0), most))));
}

// n scores of a row: its limit sinks to the smallest upper bound, and codes with a lower bound under it are kept. most: what any of the scores
// is off by at most, which tells of nearly all that they need no bounds of their own. Returns how many had no place, and were settled or
// dropped at once.
inline int64_t pick(const BytePlan& plan, int64_t at, const ExactCodes& e, const ByteRow& steps, float most, Row* row, float* limit,
                    float* scores, int64_t n) {
  V lowest[2] = {load(scores), load(scores + W)};
  for (int64_t i = kUnit; i < n; i += kUnit) {
    lowest[0] = min(lowest[0], load(scores + i));
    lowest[1] = min(lowest[1], load(scores + i + W));
  }
  const float least = smallest(min(lowest[0], lowest[1])), slack = 2.0f * row->slack;
  if (!(least - most < *limit)) return 0;
  if (least + most + slack < *limit) *limit = least + most + slack;
  constexpr int kUnits = kByteScores / kUnit;
  alignas(64) uint32_t hits[kUnits] = {};
  const V off = set(most), reach = set(*limit);
  for (int64_t i = 0; i < n; i += kUnit)
    hits[i / kUnit] = less(sub(load(scores + i), off), reach) | less(sub(load(scores + i + W), off), reach) << W;
  const uint64_t some = not_zero<kUnits>(hits);
  V upper = set(__builtin_inff());
  for (uint64_t left = some; left; left &= left - 1) {
    for (int64_t j = __builtin_ctzll(left) * kUnit, end = j + kUnit; j < end; j += W) {
      const V score = load(scores + j), own = off_by(steps, load(plan.error + at + j), load(plan.length + at + j));
      upper = min(upper, add(score, own));
      store(scores + j, sub(score, own));
    }
  }
  const float sunk = smallest(upper) + slack;
  if (sunk < *limit) *limit = sunk;
  const V bound = set(*limit);
  int64_t displaced = 0;
  for (uint64_t left = some; left; left &= left - 1) {
    const int64_t i = __builtin_ctzll(left) * kUnit;
    for (uint32_t kept = less(load(scores + i), bound) | less(load(scores + i + W), bound) << W; kept; kept &= kept - 1) {
      const int64_t j = i + __builtin_ctz(kept);
      const int before = row->count;
      append(e, row, plan.id[at + j], scores[j], *limit);
      if (row->count <= before) displaced += before;
    }
  }
  return displaced;
}

int64_t bytes(const BytePlan& plan, const ExactCodes& e, const int32_t* tiles, const ByteRow* steps, int64_t tile_count, float* limits,
              Row* rows, float* scratch) {
  constexpr int kTogether = kByteScores / kPanel;
  int64_t settled = 0;
  for (int64_t first = 0; first < plan.panels_count; first += kTogether) {
    const int64_t n = plan.panels_count - first < kTogether ? plan.panels_count - first : kTogether;
    const V error = largest_of(plan.error + first * kPanel, n * kPanel), length = largest_of(plan.length + first * kPanel, n * kPanel);
    for (int64_t t = 0; t < tile_count; ++t) {
      for (int64_t p = 0; p < n; ++p)
        score_bytes(plan, (first + p) * kPanel, tiles + t * plan.quads * kRows, steps + t * kRows, scratch + p * kPanel);
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = t * kRows + r;
        const float most = smallest(off_by(steps[at], error, length));
        settled += pick(plan, first * kPanel, e, steps[at], most, &rows[at], &limits[at], scratch + r * kByteScores, n * kPanel);
      }
    }
  }
  for (int64_t r = 0; r < tile_count * kRows; ++r) {
    compact(&rows[r], limits[r]);
    settled += rows[r].count;
  }
  settle_rows(e, rows, (int)(tile_count * kRows));
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
