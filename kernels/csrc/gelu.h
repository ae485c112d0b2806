// GELU and its derivative with one exponential and one division, to fp32 accuracy.
//
// tail(x) = Phi(-|x|) = exp(-x^2 / 2) Q(t), t = 1 / (1 + 0.3 |x|), with Q a polynomial of degree 8 fitted to the scaled
// complementary error function: relative error 6e-8 over |x| < 14, as small as fp32's own, also far out in the tail.

#pragma once

#include "vec.h"

namespace fcmae {

template <int N>
inline vec<N> exp2_negative(vec<N> y) {  // for y <= 0; below -110 it stays 2^-110. Relative error 1e-7
    y = y < -110.f ? vec<N>{} - 110.f : y;
    const vec<N> shifted = y + 12582912.f;  // 1.5 * 2^23: the nearest integer is in the low bits
    const vec<N> f = y - (shifted - 12582912.f);
    vec<N> p = vec<N>{} + 0.0013276471518930341f;
    p = p * f + 0.009675541330676218f;
    p = p * f + 0.05550713274963122f;
    p = p * f + 0.2402211972393402f;
    p = p * f + 0.6931469670638636f;
    p = p * f + 1.0000000716546555f;
    using ints = typename Lanes<N>::ints;
    return bits<vec<N>>(bits<ints>(p) + (bits<ints>(shifted) << 23));
}

template <int N>
struct Gelu {
    vec<N> x, magnitude, bell, tail;

    explicit Gelu(vec<N> input) : x(input) {
        magnitude = bits<vec<N>>(bits<typename Lanes<N>::ints>(x) & 0x7fffffff);
        bell = exp2_negative<N>(x * x * -0.72134752f);  // exp(-x^2 / 2)
        const vec<N> t = 1.f / (1.f + 0.3f * magnitude);
        vec<N> q = vec<N>{} + 0.03837840330217866f;
        q = q * t - 0.16916663490529313f;
        q = q * t + 0.2286610957827521f;
        q = q * t - 0.07650755621007332f;
        q = q * t + 0.1425362089615217f;
        q = q * t + 0.09468325861993022f;
        q = q * t + 0.12192040460406196f;
        q = q * t + 0.11948768150917805f;
        q = q * t + 7.169253599341898e-6f;
        tail = bell * q;
    }
    vec<N> value() const { return (x < 0.f ? vec<N>{} : x) - magnitude * tail; }
    vec<N> slope() const { return (x < 0.f ? tail : 1.f - tail) + x * bell * 0.3989422804f; }
};

}  // namespace fcmae
