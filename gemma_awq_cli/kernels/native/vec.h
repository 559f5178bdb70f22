// Sixteen lanes at a time. The compiler's own vectors carry the arithmetic on every processor; only what they cannot
// say (dot products of bytes, narrow floats) is written in intrinsics where the processor has them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef uint8_t B16 __attribute__((vector_size(16)));
typedef uint8_t B64 __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))

template <class V> INLINE V load_as(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE F16 load(const float* p) { return load_as<F16>(p); }
INLINE void store(float* p, F16 v) { memcpy(p, &v, sizeof v); }
INLINE F16 splat(float x) { return F16{} + x; }
INLINE I16 splat(int32_t x) { return I16{} + x; }
INLINE F16 to_float(I16 v) { return __builtin_convertvector(v, F16); }
INLINE F16 larger(F16 a, F16 b) { return a > b ? a : b; }
INLINE F16 smaller(F16 a, F16 b) { return a < b ? a : b; }
INLINE F16 absolute(F16 a) { return (F16)((I16)a & splat(0x7fffffff)); }
INLINE F16 fma(F16 a, F16 b, F16 c) {
#if defined(__AVX512F__)
    return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

INLINE float sum(F16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
    for (int w = 4; w; w /= 2)
        for (int i = 0; i < w; i++) s[i] += s[i + w];
    return s[0];
#endif
}
INLINE float largest(F16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float m = v[0];
    for (int i = 1; i < 16; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// Compilers take convertvector between lanes of unlike widths apart, lane by lane: hence intrinsics where there are any.
INLINE F16 load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
    return (F16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
#elif defined(__AVX2__)
    union { __m256i half[2]; F16 all; } v;
    for (int h = 0; h < 2; h++) v.half[h] = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p + 8 * h)), 16);
    return v.all;
#else
    return (F16)(__builtin_convertvector(load_as<H16>(p), U16) << 16);
#endif
}
INLINE F16 load_u8(const uint8_t* p) {
#if defined(__AVX512F__)
    return to_float((I16)_mm512_cvtepu8_epi32(load_as<__m128i>(p)));
#elif defined(__AVX2__)
    union { __m256i half[2]; I16 all; } v;
    for (int h = 0; h < 2; h++) v.half[h] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * h)));
    return to_float(v.all);
#else
    return __builtin_convertvector(load_as<B16>(p), F16);
#endif
}
// the low byte of each lane
INLINE void store_bytes(int8_t* p, I16 v) {
#if defined(__AVX512F__)
    const __m128i narrow = _mm512_cvtepi32_epi8((__m512i)v);
    memcpy(p, &narrow, 16);
#else
    typedef int8_t S16 __attribute__((vector_size(16)));
    const S16 narrow = __builtin_convertvector(v, S16);
    memcpy(p, &narrow, 16);
#endif
}
// bf16 of each lane: to nearest, ties to even; NaN stays NaN
INLINE void store_bf16(uint16_t* p, F16 x) {
    const U16 bits = (U16)x;
    const U16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U16 result = x == x ? rounded : (U16{} + 0x7fc0);
#if defined(__AVX512F__)
    const __m256i narrow = _mm512_cvtepi32_epi16((__m512i)result);
    memcpy(p, &narrow, 32);
#else
    const H16 narrow = __builtin_convertvector(result, H16);
    memcpy(p, &narrow, 32);
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
#else
    int exponent;
    float fraction = frexpf(fabsf(x), &exponent);  // |x| = fraction * 2^exponent, fraction in [0.5, 1)
    if (x == 0 || exponent < -23) return 0;
    if (exponent < -13) return (uint16_t)lrintf(fabsf(x) * 16777216.0f) | (x < 0 ? 0x8000 : 0);
    int mantissa = (int)lrintf(fraction * 2048.0f);  // 1024 .. 2048
    return (uint16_t)(((exponent + 14) << 10) + (mantissa - 1024)) | (x < 0 ? 0x8000 : 0);
#endif
}
INLINE F16 load_half(const uint16_t* p) {
#if defined(__AVX512F__)
    return (F16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    union { __m256 half[2]; F16 all; } v;
    for (int h = 0; h < 2; h++) v.half[h] = _mm256_cvtph_ps(load_as<__m128i>(p + 8 * h));
    return v.all;
#else
    F16 v;
    for (int i = 0; i < 16; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
}

// acc[lane] += sum over j of w[4 lane + j] * a[j]: w unsigned, the four signed bytes of a the same for every lane.
// SMALL: no byte of w is larger than 15.
template <bool SMALL> INLINE I16 dot4(I16 acc, B64 w, int32_t a) {
#if defined(__AVX512VNNI__)
    return (I16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(a));
#elif defined(__AVX2__)
    union { B64 all; __m256i half[2]; } bytes = {w};
    union { I16 all; __m256i half[2]; } result = {acc};
    const __m256i as = _mm256_set1_epi32(a);
    for (int h = 0; h < 2; h++) {
#if defined(__AVXVNNI__)
        result.half[h] = _mm256_dpbusd_avx_epi32(result.half[h], bytes.half[h], as);
#else
        const __m256i ones = _mm256_set1_epi16(1);
        if (SMALL) {
            const __m256i pairs = _mm256_maddubs_epi16(bytes.half[h], as);
            result.half[h] = _mm256_add_epi32(result.half[h], _mm256_madd_epi16(pairs, ones));
            continue;
        }
        // pairs of larger products saturate at 16 bits: the bytes' two halves go separately
        const __m256i low = _mm256_and_si256(bytes.half[h], _mm256_set1_epi8(15));
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes.half[h], 4), _mm256_set1_epi8(15));
        __m256i dots = _mm256_madd_epi16(_mm256_maddubs_epi16(low, as), ones);
        dots = _mm256_add_epi32(
            dots, _mm256_slli_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(high, as), ones), 4));
        result.half[h] = _mm256_add_epi32(result.half[h], dots);
#endif
    }
    return result.all;
#else
    int8_t bytes[4];
    memcpy(bytes, &a, 4);
    for (int lane = 0; lane < 16; lane++)
        for (int j = 0; j < 4; j++) acc[lane] += (int32_t)w[4 * lane + j] * bytes[j];
    return acc;
#endif
}

// exp by a polynomial on [-ln2/2, ln2/2]; relative error below 2e-7 where the result is a normal float, 0 below -87
INLINE F16 exponential(F16 x) {
    const F16 clamped = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    const F16 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const F16 whole = fma(clamped, splat(1.44269504f), shift) - shift;
    F16 rest = fma(whole, splat(-0.693359375f), clamped);
    rest = fma(whole, splat(2.12194440e-4f), rest);
    F16 p = splat(1.0f / 5040);
    p = fma(p, rest, splat(1.0f / 720));
    p = fma(p, rest, splat(1.0f / 120));
    p = fma(p, rest, splat(1.0f / 24));
    p = fma(p, rest, splat(1.0f / 6));
    p = fma(p, rest, splat(0.5f));
    p = fma(p, rest, splat(1.0f));
    p = fma(p, rest, splat(1.0f));
    const F16 power = (F16)((__builtin_convertvector(whole, I16) + 127) << 23);
    const F16 result = x < splat(-87.0f) ? splat(0.0f) : p * power;
    return x == x ? result : x;
}
INLINE F16 hyperbolic_tangent(F16 x) { return splat(1.0f) - splat(2.0f) / (exponential(x + x) + splat(1.0f)); }
INLINE F16 gelu_tanh(F16 x) {
    const F16 inner = splat(0.7978845608f) * fma(splat(0.044715f) * x * x, x, x);
    return splat(0.5f) * x * (splat(1.0f) + hyperbolic_tangent(inner));
}
