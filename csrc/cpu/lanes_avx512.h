// Vectors of the AVX-512 level. Included only by *_avx512.cpp, inside an anonymous namespace.
constexpr int W = 16;
constexpr int kRows = 12;  // 12 rows x 2 vectors = 24 accumulators, 2 vectors of codes, 1 broadcast: 27 of 32 registers
constexpr float kOpsPerTerm = 1.0f;
using V = __m512;
using D = __m512d;
constexpr int WD = 8;
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load_part(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
inline void store_part(float* p, V a, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a); }
inline V set(float a) { return _mm512_set1_ps(a); }
inline V set_pair(const float* p) {  // p[0], p[1], p[0], p[1] ...
  double pair;
  __builtin_memcpy(&pair, p, 8);
  return _mm512_castpd_ps(_mm512_set1_pd(pair));
}
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline uint32_t less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline uint32_t equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline float sum(V a) { return _mm512_reduce_add_ps(a); }
inline float smallest(V a) { return _mm512_reduce_min_ps(a); }
inline bool all_finite(V a) {
  // Class bits: quiet NaN 0x01, +inf 0x08, -inf 0x10, signalling NaN 0x80.
  return _mm512_fpclass_ps_mask(a, 0x99) == 0;
}
inline D widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline D dsub(D a, D b) { return _mm512_sub_pd(a, b); }
inline D dmul(D a, D b) { return _mm512_mul_pd(a, b); }
inline void dstore(double* p, D a) { _mm512_storeu_pd(p, a); }
inline D dload(const double* p) { return _mm512_loadu_pd(p); }
inline D dadd(D a, D b) { return _mm512_add_pd(a, b); }
using H = __m512i;
inline H hash_start() { return _mm512_set1_epi32(0x2545F491); }
inline H hash_mix(H h, V v) {
  h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_castps_si512(v)), _mm512_set1_epi32(0x5BD1E995));
  return _mm512_xor_si512(h, _mm512_srli_epi32(h, 15));
}
inline void hash_store(uint32_t* p, H h) { _mm512_storeu_si512(p, h); }
