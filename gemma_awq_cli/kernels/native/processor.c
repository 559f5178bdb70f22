// Which prebuilt libraries this processor can run. It is a library of its own, compiled for the oldest processors:
// loading one of the others already runs instructions that may be missing.

#include <stdint.h>

#if defined(__x86_64__)
#include <cpuid.h>

#define ALL(word, bits) (((word) & (bits)) == (uint32_t)(bits))
#define AVX_STATE 0x06     // XMM and YMM
#define AVX512_STATE 0xe6  // and mask registers, the upper halves of ZMM 0..15, ZMM 16..31

// Which registers the system saves when it switches threads: an instruction set without its own cannot be used.
static uint32_t saved_registers(uint32_t leaf1_c) {
    uint32_t low, high;
    if (!(leaf1_c & bit_OSXSAVE)) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static const char* runnable(void) {
    uint32_t a, b, c, d, saved, most = 0, base_c = 0, extended_c = 0, more_a = 0;
    uint32_t features_b = 0, features_c = 0;
    if (__get_cpuid(1, &a, &b, &c, &d)) base_c = c;
    if (__get_cpuid(0x80000001, &a, &b, &c, &d)) extended_c = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) most = a, features_b = b, features_c = c;
    if (most >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) more_a = a;
    saved = saved_registers(base_c);
    // x86-64-v3, and x86-64-v4 with VNNI, as the psABI and compilers define them
    const int v3 = ALL(saved, AVX_STATE) && ALL(extended_c, bit_LAHF_LM | bit_ABM) &&
                   ALL(base_c, bit_SSE3 | bit_SSSE3 | bit_FMA | bit_CMPXCHG16B | bit_SSE4_1 | bit_SSE4_2 | bit_MOVBE |
                                   bit_POPCNT | bit_AVX | bit_F16C) &&
                   ALL(features_b, bit_BMI | bit_AVX2 | bit_BMI2);
    const int v4 = v3 && ALL(saved, AVX512_STATE) &&
                   ALL(features_b, bit_AVX512F | bit_AVX512DQ | bit_AVX512CD | bit_AVX512BW | bit_AVX512VL);
    const int vnni = v3 && ALL(more_a, bit_AVXVNNI);
    if (v4 && ALL(features_c, bit_AVX512VNNI)) return vnni ? "avx512_vnni avx_vnni avx2" : "avx512_vnni avx2";
    return vnni ? "avx_vnni avx2" : v3 ? "avx2" : "";
}

#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static const char* runnable(void) {  // all of them have dot products
    int i8mm = 0;
    size_t size = sizeof i8mm;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &i8mm, &size, 0, 0) == 0 && i8mm ? "i8mm dotprod" : "dotprod";
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static const char* runnable(void) {
    const int half = getauxval(AT_HWCAP) >> 10 & 1, dotprod = half && (getauxval(AT_HWCAP) >> 20 & 1);
    const int i8mm = dotprod && (getauxval(26) >> 13 & 1);  // AT_HWCAP2
    return i8mm ? "i8mm dotprod" : dotprod ? "dotprod" : "";
}

#else

static const char* runnable(void) { return ""; }

#endif

#pragma GCC visibility push(default)
// The names of the libraries that run here, the fastest first, with spaces between them.
#if defined(__cplusplus)
extern "C"
#endif
const char* gaq_runnable(void) { return runnable(); }
#pragma GCC visibility pop
