// Vectors of N floats by the compiler's own vector types, loaded from and stored to fp32, bf16 or fp16.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef FCMAE_BYTES
#define FCMAE_BYTES 16  // of one vector register
#endif

namespace fcmae {

constexpr int WIDTH = FCMAE_BYTES / 4;

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

template <int N>
struct Lanes {
    typedef float type __attribute__((vector_size(N * 4)));
    typedef int32_t ints __attribute__((vector_size(N * 4)));
    typedef uint32_t words __attribute__((vector_size(N * 4)));
    typedef uint16_t halves __attribute__((vector_size(N * 2)));
};
template <int N>
using vec = typename Lanes<N>::type;

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <int N>
inline vec<N> load(const float* p) {
    vec<N> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <int N>
inline void store(float* p, vec<N> v) {
    std::memcpy(p, &v, sizeof v);
}

template <int N>
inline vec<N> load(const bf16* p) {
    typename Lanes<N>::halves h;
    std::memcpy(&h, p, sizeof h);
    return bits<vec<N>>(__builtin_convertvector(h, typename Lanes<N>::words) << 16);
}
template <int N>
inline void store(bf16* p, vec<N> v) {  // to nearest even; a NaN stays one
    const auto w = bits<typename Lanes<N>::words>(v);
    const auto rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    const auto quiet = (w >> 16) | 0x40;
    const auto nan = bits<typename Lanes<N>::words>(v != v);
    const auto h = __builtin_convertvector((rounded & ~nan) | (quiet & nan), typename Lanes<N>::halves);
    std::memcpy(p, &h, sizeof h);
}

inline float widen(uint16_t h) {  // fp16, by exact integer steps
    const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return bits<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // As a float with the exponent of an fp16 read as fp32's, then scaled back: right for subnormals too.
    return bits<float>(bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f) | sign);
}
inline uint16_t narrow(float f) {  // to nearest even
    const uint32_t w = bits<uint32_t>(f), sign = w >> 16 & 0x8000, magnitude = w & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
    if (magnitude < 0x38800000)                          // subnormal: adding 0.5 leaves 2^-24 as the last bit
        return sign | (bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000);
    return sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

template <int N>
inline vec<N> load(const fp16* p) {
    vec<N> v;
#if defined(__F16C__)
    if constexpr (N % 8 == 0) {
        for (int i = 0; i < N; i += 8) {
            const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
            std::memcpy(reinterpret_cast<float*>(&v) + i, &part, sizeof part);
        }
        return v;
    }
#endif
    for (int i = 0; i < N; ++i) v[i] = widen(p[i].bits);
    return v;
}
template <int N>
inline void store(fp16* p, vec<N> v) {
#if defined(__F16C__)
    if constexpr (N % 8 == 0) {
        for (int i = 0; i < N; i += 8) {
            __m256 part;
            std::memcpy(&part, reinterpret_cast<const float*>(&v) + i, sizeof part);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
        }
        return;
    }
#endif
    for (int i = 0; i < N; ++i) p[i].bits = narrow(v[i]);
}

// The first `count` lanes; the others are zero.
template <int N, typename S>
inline vec<N> load(const S* p, int count) {
    if (count == N) return load<N>(p);
    S part[N] = {};
    std::memcpy(part, p, count * sizeof(S));
    return load<N>(part);
}
template <int N, typename S>
inline void store(S* p, vec<N> v, int count) {
    if (count == N) return store<N>(p, v);
    S part[N];
    store<N>(part, v);
    std::memcpy(p, part, count * sizeof(S));
}

template <int N>
inline float sum(vec<N> v) {
    float total[N];
    std::memcpy(total, &v, sizeof v);
    for (int half = N / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) total[i] += total[i + half];
    return total[0];
}

}  // namespace fcmae
