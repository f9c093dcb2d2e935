// Vectors of the portable level: four floats by the compiler's vector extension (SSE2, NEON, or plain code). No FMA.
constexpr int W = 4;
constexpr int kRows = 4;
constexpr float kOpsPerTerm = 2.0f;
constexpr float kPairCost = 4.0f;  // multiplied and added apart, and more vectors to compare
typedef float V __attribute__((vector_size(16), aligned(4)));
typedef int I __attribute__((vector_size(16)));
typedef double D __attribute__((vector_size(16), aligned(8)));
constexpr int WD = 2;
inline V load(const float* p) { return V{p[0], p[1], p[2], p[3]}; }
inline V load_part(const float* p, int n) {
  V a = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) a[i] = p[i];
  return a;
}
inline void store_part(float* p, V a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a[i];
}
inline void store(float* p, V a) { store_part(p, a, 4); }
inline V set(float a) { return V{a, a, a, a}; }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V fnma(V a, V b, V c) { return c - a * b; }
inline V root(V a) {
  for (int i = 0; i < 4; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
inline V min(V a, V b) { return a < b ? a : b; }
inline V max(V a, V b) { return a > b ? a : b; }
inline uint32_t less(V a, V b) {
  I m = a < b;
  return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
}
inline uint32_t equal(V a, V b) {
  I m = a == b;
  return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
}
inline float sum(V a) { return (a[0] + a[1]) + (a[2] + a[3]); }
inline void four_sums(const V* a, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(a[i]);
}
// Which of n values (64 at most) are not zero.
template <int n>
inline uint64_t not_zero(const uint32_t* p) {
  uint64_t some = 0;
  for (int i = 0; i < n; ++i) some |= (uint64_t)(p[i] != 0) << i;
  return some;
}
inline float smallest(V a) {
  float s = a[0];
  for (int i = 1; i < 4; ++i) s = a[i] < s ? a[i] : s;
  return s;
}
inline void transpose(V* v) {
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = t;
    }
}
inline bool all_finite(V a) {
  V zero = a - a;
  I bad = zero != zero;
  return (bad[0] | bad[1] | bad[2] | bad[3]) == 0;
}
inline D widen(const float* p) { return D{(double)p[0], (double)p[1]}; }
inline D dsub(D a, D b) { return a - b; }
inline D dmul(D a, D b) { return a * b; }
inline void dstore(double* p, D a) { p[0] = a[0]; p[1] = a[1]; }
inline D dfma(D a, D b, D c) { return a * b + c; }
inline double dsum(D a) { return a[0] + a[1]; }
inline D dload(const double* p) { return D{p[0], p[1]}; }
inline D dadd(D a, D b) { return a + b; }
typedef uint32_t H __attribute__((vector_size(16)));
inline H hash_start() { return H{1, 2, 3, 4} * 0x2545F491u; }  // each lane its own
inline H hash_mix(H h, V v) {
  H bits;
  __builtin_memcpy(&bits, &v, 16);
  h = (h ^ bits) * 0x5BD1E995u;
  return h ^ (h >> 15);
}
inline void hash_store(uint32_t* p, H h) { __builtin_memcpy(p, &h, 16); }
// Vectors of W int32, each lane two int16 where a name says so.
typedef short S __attribute__((vector_size(16)));
inline I iload(const int32_t* p) { return I{p[0], p[1], p[2], p[3]}; }
inline void istore(int32_t* p, I a) { __builtin_memcpy(p, &a, 16); }
inline I iset(int32_t a) { return I{a, a, a, a}; }
inline I imin(I a, I b) { return a < b ? a : b; }
inline I imin_pairs(I a, I b) { return (I)((S)a < (S)b ? (S)a : (S)b); }
inline I imax_pairs(I a, I b) { return (I)((S)a > (S)b ? (S)a : (S)b); }
typedef unsigned short U __attribute__((vector_size(16)));  // boxes that hold nothing wrap around
inline I isub_pairs(I a, I b) { return (I)((U)a - (U)b); }
inline I half_difference(I a, I b) { return (a - b) >> 1; }  // rounded down
inline I with_bits(I a, I which, I bits) { return (a & ~which) | bits; }
inline I add_dots(I total, I a, I b) {  // of the pairs
#if defined(__SSE2__)
  return total + (I)__builtin_ia32_pmaddwd128((S)a, (S)b);  // which the compiler does not make of the line below
#else
  const auto low = [](I v) { return (I)((H)v << 16) >> 16; };
  return total + low(a) * low(b) + (a >> 16) * (b >> 16);
#endif
}
inline uint32_t bits_of(I m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
inline uint32_t at_most(I a, I b) { return bits_of(a <= b); }
inline uint32_t iequal(I a, I b) { return bits_of(a == b); }
inline int32_t ismallest(I a) {
  int32_t s = a[0];
  for (int i = 1; i < 4; ++i) s = a[i] < s ? a[i] : s;
  return s;
}
inline I to_steps(V a) {  // the nearest integers
  I steps;
  for (int i = 0; i < 4; ++i) steps[i] = (int)__builtin_lrintf(a[i]);
  return steps;
}
inline I pair_up(I low, I high) { return (I)(((H)low & 0xFFFFu) | ((H)high << 16)); }
inline V as_floats(I a) {
  V v;
  __builtin_memcpy(&v, &a, 16);
  return v;
}
