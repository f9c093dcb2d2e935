// The dense road in bytes. Included by search_impl.h; a level has it where one instruction adds four products of bytes.
#if defined(__AVX512VNNI__)

// Dots of kUnit codes with kRows rows, held in registers from the first coordinate to the last. Codes carry 128 too much; -128 times the
// sum of a row takes it away.
inline __attribute__((always_inline)) void dot_unit(const int32_t* codes, const int32_t* tile, const ByteRow* steps, int64_t quads,
                                                    I (&a)[kRows], I (&b)[kRows]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) a[r] = b[r] = iset(-128 * steps[r].sum);
  for (int64_t q = 0; q < quads; ++q) {
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
}

// Lower bounds of n codes in the place of their dots with a row; the smallest lower and upper one.
inline void bound_codes(const BytePlan& plan, int64_t at, const ByteRow& row, float* scores, int64_t n, float* lowest, float* upper) {
  const V unit = set(row.unit), error = set(row.error), length = set(row.length);
  const float *start = plan.start + at, *code_unit = plan.unit + at, *code_length = plan.length + at, *code_error = plan.error + at;
  V least[2] = {set(__builtin_inff()), set(__builtin_inff())}, low[2] = {least[0], least[0]};
  for (int64_t i = 0; i < n; i += kUnit) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int64_t j = i + h * W;
      const V dot = to_float(iload(reinterpret_cast<const int32_t*>(scores + j)));
      const V score = fnma(mul(dot, load(code_unit + j)), unit, load(start + j));
      const V off = fma(length, load(code_error + j), mul(error, load(code_length + j)));
      least[h] = min(least[h], add(score, off));
      const V bound = sub(score, off);
      low[h] = min(low[h], bound);
      store(scores + j, bound);
    }
  }
  *lowest = smallest(min(low[0], low[1]));
  *upper = smallest(min(least[0], least[1]));
}

// A row's limit sinks to the smallest upper bound; codes with a lower bound under it are kept. Returns how many had no place, and were settled
// or dropped at once.
inline int64_t pick(const BytePlan& plan, int64_t at, const ExactCodes& e, const ByteRow& steps, Row* row, float* limit, float* scores,
                 int64_t n) {
  float lowest, upper;
  bound_codes(plan, at, steps, scores, n, &lowest, &upper);
  upper += 2.0f * row->slack;
  if (upper < *limit) *limit = upper;
  if (!(lowest < *limit)) return 0;
  int64_t displaced = 0;
  const V bound = set(*limit);
  for (int64_t i = 0; i < n; i += kUnit) {
    uint32_t hits = less(load(scores + i), bound) | less(load(scores + i + W), bound) << W;
    while (hits) {
      const int lane = __builtin_ctz(hits);
      hits &= hits - 1;
      const int before = row->count;
      append(e, row, plan.id[at + i + lane], scores[i + lane], *limit);
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
    for (int64_t t = 0; t < tile_count; ++t) {
      for (int64_t p = 0; p < n; ++p) {
        I a[kRows], b[kRows];
        dot_unit(plan.panels + (first + p) * plan.quads * kPanel, tiles + t * plan.quads * kRows, steps + t * kRows, plan.quads, a, b);
        int32_t* to = reinterpret_cast<int32_t*>(scratch) + p * kPanel;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          istore(to + r * kByteScores, a[r]);
          istore(to + r * kByteScores + W, b[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = t * kRows + r;
        settled += pick(plan, first * kPanel, e, steps[at], &rows[at], &limits[at], scratch + r * kByteScores, n * kPanel);
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
