// Vectors of the AVX-512 level. Included only by *_avx512.cpp, inside an anonymous namespace.
constexpr int W = 16;
constexpr int kRows = 12;  // 12 rows x 2 vectors = 24 accumulators, 2 vectors of codes, 1 broadcast: 27 of 32 registers
constexpr float kOpsPerTerm = 1.0f;
#if defined(__AVX512VNNI__)
constexpr float kPairCost = 1.0f;  // one instruction
#else
constexpr float kPairCost = 4.0f;
#endif
using V = __m512;
using D = __m512d;
constexpr int WD = 8;
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load_part(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
inline void store_part(float* p, V a, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a); }
inline V set(float a) { return _mm512_set1_ps(a); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
inline V root(V a) { return _mm512_sqrt_ps(a); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline uint32_t less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline uint32_t equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline float sum(V a) { return _mm512_reduce_add_ps(a); }
inline V halve(V a, V b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }  // their partial sums in turns
inline V quarter(V a, V b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE)); }
inline __m256 fold(V a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
inline void four_sums(const V* a, float* out) {
  const __m256 half = fold(quarter(halve(a[0], a[1]), halve(a[2], a[3])));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
// Which of n values (64 at most) are not zero.
template <int n>
inline uint64_t not_zero(const uint32_t* p) {
  uint64_t some = 0;
  for (int i = 0; i < n; i += 16) {
    const __m512i v = _mm512_loadu_si512(p + i);
    some |= (uint64_t)_mm512_test_epi32_mask(v, v) << i;
  }
  return some;
}
inline float smallest(V a) { return _mm512_reduce_min_ps(a); }
inline void transpose(V* v) {
  V t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 blocks
    const V a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
    const V c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // and 4 x 4 of those
    const V a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xDD);
    const V c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xDD);
    v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
    v[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
}
inline bool all_finite(V a) {
  // Class bits: quiet NaN 0x01, +inf 0x08, -inf 0x10, signalling NaN 0x80.
  return _mm512_fpclass_ps_mask(a, 0x99) == 0;
}
inline D widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline D dsub(D a, D b) { return _mm512_sub_pd(a, b); }
inline D dmul(D a, D b) { return _mm512_mul_pd(a, b); }
inline void dstore(double* p, D a) { _mm512_storeu_pd(p, a); }
inline D dfma(D a, D b, D c) { return _mm512_fmadd_pd(a, b, c); }
inline double dsum(D a) { return _mm512_reduce_add_pd(a); }
inline D dload(const double* p) { return _mm512_loadu_pd(p); }
inline D dadd(D a, D b) { return _mm512_add_pd(a, b); }
using H = __m512i;
inline H hash_start() {  // each lane its own
  const H lane = _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
  return _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x2545F491));
}
inline H hash_mix(H h, V v) {
  h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_castps_si512(v)), _mm512_set1_epi32(0x5BD1E995));
  return _mm512_xor_si512(h, _mm512_srli_epi32(h, 15));
}
inline void hash_store(uint32_t* p, H h) { _mm512_storeu_si512(p, h); }
// Vectors of W int32, each lane two int16 where a name says so.
using I = __m512i;
inline I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void istore(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
inline I iset(int32_t a) { return _mm512_set1_epi32(a); }
inline I imin(I a, I b) { return _mm512_min_epi32(a, b); }
inline I imin_pairs(I a, I b) { return _mm512_min_epi16(a, b); }
inline I imax_pairs(I a, I b) { return _mm512_max_epi16(a, b); }
inline I isub_pairs(I a, I b) { return _mm512_sub_epi16(a, b); }
inline I half_difference(I a, I b) { return _mm512_srai_epi32(_mm512_sub_epi32(a, b), 1); }  // rounded down
inline I with_bits(I a, I which, I bits) { return _mm512_ternarylogic_epi32(a, which, bits, 0xBA); }  // (a & ~which) | bits
inline I add_dots(I total, I a, I b) {  // of the pairs
#if defined(__AVX512VNNI__)
  // As an intrinsic, GCC 12 copies accumulators around, and spills some.
  asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
  return total;
#else
  return _mm512_add_epi32(total, _mm512_madd_epi16(a, b));
#endif
}
#if defined(__AVX512VNNI__)
inline void add_byte_dots(I& total, I a, I b) {  // a without sign, b with
  asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
}
inline V to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline void store_bytes(int32_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a)); }
inline I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
inline int32_t isum(I a) { return _mm512_reduce_add_epi32(a); }
#endif
inline uint32_t at_most(I a, I b) { return _mm512_cmple_epi32_mask(a, b); }
inline uint32_t iequal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline int32_t ismallest(I a) { return _mm512_reduce_min_epi32(a); }
inline I to_steps(V a) { return _mm512_cvtps_epi32(a); }  // the nearest integers
inline I pair_up(I low, I high) { return _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_slli_epi32(high, 16)); }
inline V as_floats(I a) { return _mm512_castsi512_ps(a); }
