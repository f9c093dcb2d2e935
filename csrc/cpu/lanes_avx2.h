// Vectors of the AVX2 level. Included only by *_avx2.cpp, inside an anonymous namespace.
constexpr int W = 8;
constexpr int kRows = 6;  // 6 rows x 2 vectors = 12 accumulators, 2 vectors of codes, 1 broadcast: 15 of 16 registers
constexpr float kOpsPerTerm = 1.0f;
constexpr float kPairCost = 4.0f;  // multiplied and added apart, and more vectors to compare
using V = __m256;
using D = __m256d;
constexpr int WD = 4;
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load_part(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store(float* p, V a) { _mm256_storeu_ps(p, a); }
inline void store_part(float* p, V a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a); }
inline V set(float a) { return _mm256_set1_ps(a); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
inline V root(V a) { return _mm256_sqrt_ps(a); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline uint32_t less(V a, V b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline uint32_t equal(V a, V b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
inline float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void four_sums(const V* a, float* out) {
  const V all = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
// Which of n values (64 at most) are not zero.
template <int n>
inline uint64_t not_zero(const uint32_t* p) {
  uint64_t some = 0;
  for (int i = 0; i < n; i += 8) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)(p + i));
    const int zero = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(v, _mm256_setzero_si256())));
    some |= (uint64_t)(zero ^ 0xFF) << i;
  }
  return some;
}
inline float smallest(V a) {
  __m128 s = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_min_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_min_ss(s, _mm_movehdup_ps(s)));
}
inline void transpose(V* v) {
  V t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4) {
    const V a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const V c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}
inline bool all_finite(V a) {
  // x - x is 0 for finite x and NaN otherwise.
  V zero = _mm256_sub_ps(a, a);
  return _mm256_movemask_ps(_mm256_cmp_ps(zero, zero, _CMP_UNORD_Q)) == 0;
}
inline D widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline D dsub(D a, D b) { return _mm256_sub_pd(a, b); }
inline D dmul(D a, D b) { return _mm256_mul_pd(a, b); }
inline void dstore(double* p, D a) { _mm256_storeu_pd(p, a); }
inline D dfma(D a, D b, D c) { return _mm256_fmadd_pd(a, b, c); }
inline double dsum(D a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline D dload(const double* p) { return _mm256_loadu_pd(p); }
inline D dadd(D a, D b) { return _mm256_add_pd(a, b); }
using H = __m256i;
inline H hash_start() {  // each lane its own
  return _mm256_mullo_epi32(_mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8), _mm256_set1_epi32(0x2545F491));
}
inline H hash_mix(H h, V v) {
  h = _mm256_mullo_epi32(_mm256_xor_si256(h, _mm256_castps_si256(v)), _mm256_set1_epi32(0x5BD1E995));
  return _mm256_xor_si256(h, _mm256_srli_epi32(h, 15));
}
inline void hash_store(uint32_t* p, H h) { _mm256_storeu_si256((__m256i*)p, h); }
// Vectors of W int32, each lane two int16 where a name says so.
using I = __m256i;
inline I iload(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void istore(int32_t* p, I a) { _mm256_storeu_si256((__m256i*)p, a); }
inline I iset(int32_t a) { return _mm256_set1_epi32(a); }
inline I imin(I a, I b) { return _mm256_min_epi32(a, b); }
inline I imin_pairs(I a, I b) { return _mm256_min_epi16(a, b); }
inline I imax_pairs(I a, I b) { return _mm256_max_epi16(a, b); }
inline I isub_pairs(I a, I b) { return _mm256_sub_epi16(a, b); }
inline I half_difference(I a, I b) { return _mm256_srai_epi32(_mm256_sub_epi32(a, b), 1); }  // rounded down
inline I with_bits(I a, I which, I bits) { return _mm256_or_si256(_mm256_andnot_si256(which, a), bits); }
inline I add_dots(I total, I a, I b) { return _mm256_add_epi32(total, _mm256_madd_epi16(a, b)); }  // of the pairs
inline uint32_t at_most(I a, I b) {
  return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b))) ^ 0xFFu;
}
inline uint32_t iequal(I a, I b) { return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b))); }
inline int32_t ismallest(I a) {
  __m128i s = _mm_min_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_min_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_min_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
inline I to_steps(V a) { return _mm256_cvtps_epi32(a); }  // the nearest integers
inline I pair_up(I low, I high) { return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA); }
inline V as_floats(I a) { return _mm256_castsi256_ps(a); }
