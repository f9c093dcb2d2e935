// Vectors of the AVX2 level. Included only by *_avx2.cpp, inside an anonymous namespace.
constexpr int W = 8;
constexpr int kRows = 6;  // 6 rows x 2 vectors = 12 accumulators, 2 vectors of codes, 1 broadcast: 15 of 16 registers
constexpr float kOpsPerTerm = 1.0f;
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
inline V set_pair(const float* p) {  // p[0], p[1], p[0], p[1] ...
  double pair;
  __builtin_memcpy(&pair, p, 8);
  return _mm256_castpd_ps(_mm256_set1_pd(pair));
}
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline uint32_t less(V a, V b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline uint32_t equal(V a, V b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
inline float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float smallest(V a) {
  __m128 s = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_min_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_min_ss(s, _mm_movehdup_ps(s)));
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
inline D dload(const double* p) { return _mm256_loadu_pd(p); }
inline D dadd(D a, D b) { return _mm256_add_pd(a, b); }
using H = __m256i;
inline H hash_start() { return _mm256_set1_epi32(0x2545F491); }
inline H hash_mix(H h, V v) {
  h = _mm256_mullo_epi32(_mm256_xor_si256(h, _mm256_castps_si256(v)), _mm256_set1_epi32(0x5BD1E995));
  return _mm256_xor_si256(h, _mm256_srli_epi32(h, 15));
}
inline void hash_store(uint32_t* p, H h) { _mm256_storeu_si256((__m256i*)p, h); }
