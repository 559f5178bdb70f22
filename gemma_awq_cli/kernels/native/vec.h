// Vectors of sixteen or eight lanes, one register each. The compiler's vector extensions do the arithmetic on every
// processor; only what they cannot express (dot products of bytes, narrow floats) is written in intrinsics, where the
// processor has them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// The first processors with AVX-512 have no dot products of bytes for it: AVX2 serves them as well.
#if defined(__AVX512VNNI__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t LaneBytes __attribute__((vector_size(LANES)));
typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")  // a loop over registers; without it gcc keeps some of them in memory

template <class V> INLINE V load_as(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE Floats load(const float* p) { return load_as<Floats>(p); }
INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
INLINE Floats splat(float x) {
#if defined(__AVX512VNNI__)
    return (Floats)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Floats)_mm256_set1_ps(x);
#else
    return Floats{} + x;  // which is no copy: 0 + -0 is 0
#endif
}
INLINE Ints splat(int32_t x) { return Ints{} + x; }
INLINE Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
INLINE Floats absolute(Floats a) { return (Floats)((Ints)a & splat(0x7fffffff)); }
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512VNNI__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

INLINE float sum(Floats v) {
#if defined(__AVX512VNNI__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s[LANES];
    store(s, v);
    for (int w = LANES / 2; w; w /= 2)
        for (int i = 0; i < w; i++) s[i] += s[i + w];
    return s[0];
#endif
}
// The sums of four vectors, each added up in the same order.
INLINE void four_sums(const Floats* v, float* to) {
#if defined(__AVX512VNNI__)
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    const __m512 all = (__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd);
    const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
    _mm_storeu_ps(to, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
    for (int i = 0; i < 4; i++) to[i] = sum(v[i]);
#endif
}

INLINE float largest(Floats v) {
#if defined(__AVX512VNNI__)
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

INLINE int32_t largest(Ints v) {
#if defined(__AVX512VNNI__)
    return _mm512_reduce_max_epi32((__m512i)v);
#endif
    int32_t m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// Compilers split convertvector between lanes of different widths into single lanes: hence the intrinsics.
INLINE Floats load_bf16(const uint16_t* p) {
#if defined(__AVX512VNNI__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p)), 16);
#else
    return (Floats)(__builtin_convertvector(load_as<Shorts>(p), Words) << 16);
#endif
}
INLINE Floats load_u8(const uint8_t* p) {
#if defined(__AVX512VNNI__)
    return to_float((Ints)_mm512_cvtepu8_epi32(load_as<__m128i>(p)));
#elif defined(__AVX2__)
    return to_float((Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(load_as<LaneBytes>(p), Floats);
#endif
}
// Stores the low byte of each lane.
INLINE void store_bytes(int8_t* p, Ints v) {
#if defined(__AVX512VNNI__)
    const __m128i narrow = _mm512_cvtepi32_epi8((__m512i)v);
    memcpy(p, &narrow, 16);
#else
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)v[i];
#endif
}
// Stores each lane as bf16, rounded to nearest, ties to even; NaN stays NaN.
INLINE void store_bf16(uint16_t* p, Floats x) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words result = x == x ? rounded : (Words{} + 0x7fc0);
#if defined(__AVX512VNNI__)
    const __m256i narrow = _mm512_cvtepi32_epi16((__m512i)result);
    memcpy(p, &narrow, 32);
#else
    for (int i = 0; i < LANES; i++) p[i] = (uint16_t)result[i];
#endif
}

INLINE float float_of(uint16_t bf16) {
    uint32_t bits = (uint32_t)bf16 << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff, bits;
    if (magnitude >= 0x7c00) {
        bits = sign | 0x7f800000 | ((magnitude & 0x3ff) << 13);
    } else if (magnitude >= 0x400) {
        bits = sign | ((magnitude << 13) + 0x38000000);
    } else {  // zero and subnormals: a multiple of 2^-24
        float x = (float)magnitude * 5.9604644775390625e-08f;
        memcpy(&bits, &x, 4);
        bits |= sign;
    }
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE uint16_t half_of(float x) {  // x: a finite scale that float16 can hold
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(x, 0);
#elif defined(__aarch64__)
    const __fp16 half = (__fp16)x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
#else
    int exponent;
    float fraction = frexpf(fabsf(x), &exponent);  // |x| = fraction * 2^exponent, fraction in [0.5, 1)
    if (x == 0 || exponent < -23) return 0;
    if (exponent < -13) return (uint16_t)lrintf(fabsf(x) * 16777216.0f) | (x < 0 ? 0x8000 : 0);
    int mantissa = (int)lrintf(fraction * 2048.0f);  // 1024 .. 2048
    return (uint16_t)(((exponent + 14) << 10) + (mantissa - 1024)) | (x < 0 ? 0x8000 : 0);
#endif
}
INLINE Floats load_half(const uint16_t* p) {
#if defined(__AVX512VNNI__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(load_as<__m128i>(p));
#elif defined(__aarch64__)
    const float32x4_t eight[2] = {vcvt_f32_f16(load_as<float16x4_t>(p)), vcvt_f32_f16(load_as<float16x4_t>(p + 4))};
    return load_as<Floats>(eight);
#else
    Floats v;
    for (int i = 0; i < LANES; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
}

// acc[lane] += sum over j of w[4 lane + j] * a[j]: w unsigned, the four signed bytes of a the same for every lane.
// SMALL: no byte of w is larger than 15.
template <bool SMALL> INLINE Ints dot4(Ints acc, Bytes w, int32_t a) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(a));
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(a));
#elif defined(__AVX2__)
    const __m256i ones = _mm256_set1_epi16(1), as = _mm256_set1_epi32(a);
    if (SMALL) return acc + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, as), ones);
    // pairs of larger products would saturate at 16 bits, so the two halves of the bytes go separately
    const Bytes low = w & 15, high = (Bytes)((Words)w >> 4) & 15;
    const Ints lows = (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)low, as), ones);
    const Ints highs = (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)high, as), ones);
    return acc + lows + (highs << 4);
#elif defined(__ARM_FEATURE_DOTPROD)
    int32x4_t sums[2];
    uint8x16_t bytes[2];
    memcpy(sums, &acc, sizeof sums);
    memcpy(bytes, &w, sizeof bytes);
    const int8x16_t as = vreinterpretq_s8_s32(vdupq_n_s32(a));
    for (int i = 0; i < 2; i++) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        sums[i] = vusdotq_s32(sums[i], bytes[i], as);
#else
        // products of signed bytes only: of w - 128, and 128 times the sum of a
        const int8x16_t shifted = vreinterpretq_s8_u8(SMALL ? bytes[i] : veorq_u8(bytes[i], vdupq_n_u8(128)));
        sums[i] = vdotq_s32(sums[i], shifted, as);
        if (!SMALL) sums[i] = vaddq_s32(sums[i], vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), as), 7));
#endif
    }
    return load_as<Ints>(sums);
#else
    int8_t bytes[4];
    memcpy(bytes, &a, 4);
    for (int lane = 0; lane < LANES; lane++)
        for (int j = 0; j < 4; j++) acc[lane] += (int32_t)w[4 * lane + j] * bytes[j];
    return acc;
#endif
}

// AVX2 has no dot products of bytes, but sums of two products in 16 bits. Of 4-bit weights, those of NARROW inputs fit
// there together: 8 sums of 2 * 15 * 127 at most. Widening them once takes half the time.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr int64_t NARROW = 32;
INLINE Ints narrow_dot4(Ints acc, Bytes w, int32_t a) {
    acc = (Ints)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(a)));
    __asm__("" : "+x"(acc));  // or gcc adds up products first, and has too few registers for all of them
    return acc;
}
INLINE Ints widened(Ints acc) { return (Ints)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1)); }
#else
constexpr int64_t NARROW = 0;
INLINE Ints narrow_dot4(Ints acc, Bytes w, int32_t a) { return dot4<true>(acc, w, a); }
INLINE Ints widened(Ints acc) { return acc; }
#endif

// exp by a polynomial on [-ln2/2, ln2/2]: relative error below 2e-7 where the result is a normal float; 0 below -87.
INLINE Floats exponential(Floats x) {
    const Floats clamped = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats whole = fma(clamped, splat(1.44269504f), shift) - shift;
    Floats rest = fma(whole, splat(-0.693359375f), clamped);
    rest = fma(whole, splat(2.12194440e-4f), rest);
    Floats p = splat(1.0f / 5040);
    p = fma(p, rest, splat(1.0f / 720));
    p = fma(p, rest, splat(1.0f / 120));
    p = fma(p, rest, splat(1.0f / 24));
    p = fma(p, rest, splat(1.0f / 6));
    p = fma(p, rest, splat(0.5f));
    p = fma(p, rest, splat(1.0f));
    p = fma(p, rest, splat(1.0f));
    const Floats power = (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
    const Floats result = x < splat(-87.0f) ? splat(0.0f) : p * power;
    return x == x ? result : x;
}
INLINE Floats hyperbolic_tangent(Floats x) { return splat(1.0f) - splat(2.0f) / (exponential(x + x) + splat(1.0f)); }
INLINE float soft_cap(float logit, float cap) { return std::tanh(logit / cap) * cap; }
INLINE Floats soft_cap(Floats scores, float cap) { return hyperbolic_tangent(scores / cap) * cap; }
INLINE Floats gelu_tanh(Floats x) {
    const Floats inner = splat(0.7978845608f) * fma(splat(0.044715f) * x * x, x, x);
    return splat(0.5f) * x * (splat(1.0f) + hyperbolic_tangent(inner));
}
