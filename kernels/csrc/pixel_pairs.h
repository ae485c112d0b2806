// Tiles of 2x2 pixels and of one: a halo of 3 reaches 24 or 48 tiles, of which most are masked. So the unit is a pair of
// visible pixels that a tap joins: an image's pairs are listed once, and every vector of channels goes down the list
// without a branch.

#pragma once

#include <vector>

#include "blocks.h"

namespace fcmae::pairs {

constexpr int VECTORS = 8;  // sums in registers

struct Pair {
    int32_t output, input, tap;  // pixels of the image's packed tiles; the tap that joins them
};

// In order of the outputs.
template <int T>
std::vector<Pair> list(const Tables& t, const Geometry& g) {
    constexpr int REACH = (3 + T - 1) / T;  // tiles that a halo of 3 pixels spans
    std::vector<Pair> made;
    made.reserve(g.keep * T * T * 49);
    for (int64_t k = 0; k < g.keep; ++k) {
        const int ty = t.keep[k] / g.gw, tx = t.keep[k] % g.gw;
        const int top = std::max(-REACH, -ty), bottom = std::min<int>(REACH, g.gh - 1 - ty);
        const int left = std::max(-REACH, -tx), right = std::min<int>(REACH, g.gw - 1 - tx);
        for (int o = 0; o < T * T; ++o)
            for (int dy = top; dy <= bottom; ++dy)
                for (int dx = left; dx <= right; ++dx) {
                    const int64_t s = t.slot[(ty + dy) * g.gw + tx + dx];
                    if (s < 0) continue;
                    for (int i = 0; i < T * T; ++i) {
                        const int ky = dy * T + i / T - o / T + 3, kx = dx * T + i % T - o % T + 3;
                        if (ky >= 0 && ky <= 6 && kx >= 0 && kx <= 6)
                            made.push_back({int32_t(k * T * T + o), int32_t(s * T * T + i), ky * 7 + kx});
                    }
                }
    }
    return made;
}

inline std::vector<Pair> by_tap(const std::vector<Pair>& pairs) {
    size_t place[50] = {};
    for (const Pair& p : pairs) ++place[p.tap + 1];
    for (int tap = 0; tap < 49; ++tap) place[tap + 1] += place[tap];
    std::vector<Pair> sorted(pairs.size());
    for (const Pair& p : pairs) sorted[place[p.tap]++] = p;
    return sorted;
}

// One image, channels [first, end). Every output has a pair at least: itself.
template <int T, typename S>
void forward(const S* x, const float* weight, const float* bias, S* y, const Tables& t, const Geometry& g,
             int64_t first, int64_t end) {
    const std::vector<Pair> all = list<T>(t, g);
    over_blocks<VECTORS, WIDTH>(first, end, [&](int64_t c, auto vectors, auto lanes) {
        constexpr int V = vectors(), N = lanes();
        for (size_t p = 0; p < all.size();) {
            const int32_t output = all[p].output;
            vec<N> acc[V];
            for (int v = 0; v < V; ++v) acc[v] = bias ? load<N>(bias + c + v * N) : vec<N>{};
            for (; p < all.size() && all[p].output == output; ++p) {
                const S* in = x + all[p].input * g.channels + c;
                const float* w = weight + all[p].tap * g.channels + c;
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) acc[v] += load<N>(in + v * N) * load<N>(w + v * N);
            }
            for (int v = 0; v < V; ++v) store<N>(y + output * g.channels + c + v * N, acc[v]);
        }
    });
}

// One image, channels [first, end): partial (50, C).
template <int T, typename S>
void weight_grad(const S* x, const S* grad, float* partial, const Tables& t, const Geometry& g, int64_t first,
                 int64_t end) {
    const std::vector<Pair> all = by_tap(list<T>(t, g));
    over_blocks<VECTORS, WIDTH>(first, end, [&](int64_t c, auto vectors, auto lanes) {
        constexpr int V = vectors(), N = lanes();
        size_t p = 0;
        for (int tap = 0; tap < 50; ++tap) {
            vec<N> acc[V] = {};
            if (tap == 49)
                for (int64_t o = 0; o < g.keep * T * T; ++o)
                    for (int v = 0; v < V; ++v) acc[v] += load<N>(grad + o * g.channels + c + v * N);
            for (; p < all.size() && all[p].tap == tap; ++p) {
                const S *in = x + all[p].input * g.channels + c, *out = grad + all[p].output * g.channels + c;
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) acc[v] += load<N>(in + v * N) * load<N>(out + v * N);
            }
            for (int v = 0; v < V; ++v) store<N>(partial + tap * g.channels + c + v * N, acc[v]);
        }
    });
}

}  // namespace fcmae::pairs
