// The kernels of ema_level.h for the lanes of one level (lanes_*.h, included before it) and its `narrow`. Inside an anonymous namespace.

constexpr int kSums = 8;                 // vectors of sums that stay in registers while the rows pass
constexpr int64_t kRowsAhead = 8;        // rows lie anywhere; this many cover the way to memory
constexpr int64_t kFetchedBytes = 2048;  // of a row at most: rows ahead must not push each other out of the first-level cache

inline void fetch_row(const float* row, int64_t dim) {
  const int64_t bytes = dim * 4 < kFetchedBytes ? dim * 4 : kFetchedBytes;
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch((const char*)row + b);
}

// Columns d .. d + kCount * WD of all rows. check gathers x * 0: NaN where a sum is not finite.
template <int kCount>
inline void sum_columns(const float* base, int64_t ld, const int64_t* at, int64_t n, int64_t d, double* total, float* sums, D* check) {
  const double zeros[WD] = {};
  D sum[kCount];
  for (int j = 0; j < kCount; ++j) sum[j] = dload(zeros);
  for (int64_t i = 0; i < n; ++i) {
    const float* row = base + at[i] * ld + d;
    for (int j = 0; j < kCount; ++j) sum[j] = dadd(sum[j], widen(row + j * WD));
  }
  for (int j = 0; j < kCount; ++j) {
    *check = dadd(*check, dmul(sum[j], dload(zeros)));
    if (total) dstore(total + d + j * WD, sum[j]);
    else narrow(sums + d + j * WD, sum[j]);
  }
}

bool sum_rows(const float* base, int64_t ld, const int64_t* at, int64_t n, int64_t known, int64_t dim, double* total,
              float* sums) {
  const int64_t end = n + kRowsAhead < known ? n + kRowsAhead : known;
  for (int64_t i = kRowsAhead; i < end; ++i) fetch_row(base + at[i] * ld, dim);
  double check[WD] = {};
  D checks = dload(check);
  int64_t d = 0;
  for (; d + kSums * WD <= dim; d += kSums * WD) sum_columns<kSums>(base, ld, at, n, d, total, sums, &checks);
  for (; d + WD <= dim; d += WD) sum_columns<1>(base, ld, at, n, d, total, sums, &checks);
  dstore(check, checks);
  for (; d < dim; ++d) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += (double)base[at[i] * ld + d];
    check[0] += sum * 0.0;
    if (total) total[d] = sum;
    else sums[d] = (float)sum;
  }
  for (int j = 1; j < WD; ++j) check[0] += check[j];
  return check[0] == 0.0;
}

// Plain loops from here on: the compiler makes this level's vectors of them.
inline bool all_finite(const float* values, int64_t dim) {
  uint32_t unlike = 0;  // a value minus itself is 0, but for NaN and Inf
  for (int64_t d = 0; d < dim; ++d) unlike |= (uint32_t)(values[d] - values[d] != 0.0f);
  return unlike == 0;
}

bool blend(const float* total, const float* sums, float* out, float keep, float take, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    const float old = total[d] * keep, fresh = sums[d] * take;
    out[d] = old + fresh;
  }
  return all_finite(out, dim);
}

bool divide(const float* total, float* out, float size, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) out[d] = total[d] / size;
  return all_finite(out, dim);
}

const vqfast::EmaKernels kKernels = {sum_rows, blend, divide};
