// Tiles of 8x8 and 4x4 pixels: the halo of 3 lies in the 8 tiles around. The unit is a row of a tile, whose T outputs stay
// in registers over all taps; a tile's pixels stay in the first cache for the next vector of channels.

#pragma once

#include "blocks.h"

namespace fcmae::rows {

constexpr int VECTORS = 2;  // of channels per visit to a tile: a whole cache line

// Vectors for which a row of T pixels leaves registers (16 of them, AVX2).
constexpr int depth(int t, int vectors) { return t == 8 ? 1 : vectors; }

// body(dx as a constant, input) for the visible tiles, dx columns away, that row `row` of tile (ty, tx) needs for tap row
// ky; input is the first pixel of the row that such a tile contributes.
template <int T, typename S, typename Body>
inline void neighbours(const S* x, const Tables& t, const Geometry& g, int ty, int tx, int row, int ky, Body body) {
    const int y = row + ky - 3, dy = y < 0 ? -1 : y >= T, ny = ty + dy;
    if (ny < 0 || ny >= g.gh) return;
    const int64_t* slot = t.slot + ny * g.gw + tx;
    const auto input = [&](int dx) { return x + (slot[dx] * T + (y - dy * T)) * T * g.channels; };
    if (tx > 0 && slot[-1] >= 0) body(Constant<-1>(), input(-1));
    if (slot[0] >= 0) body(Constant<0>(), input(0));
    if (tx + 1 < g.gw && slot[1] >= 0) body(Constant<1>(), input(1));
}

// acc[o] += x[j] * w[kx] for every pixel j of a tile DX columns away and every output o it reaches.
template <int T, int V, int N, int DX, typename S>
inline void taps(vec<N> (&acc)[T][V], const S* x, const float* w, int64_t channels) {
#pragma GCC unroll 8
    for (int j = 0; j < T; ++j) {
        if (DX * T + j - (T - 1) > 3 || DX * T + j < -3) continue;
        vec<N> pixel[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) pixel[v] = load<N>(x + j * channels + v * N);
#pragma GCC unroll 8
        for (int o = 0; o < T; ++o) {
            const int kx = DX * T + j - o + 3;
            if (kx < 0 || kx > 6) continue;
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) acc[o][v] += pixel[v] * load<N>(w + kx * channels + v * N);
        }
    }
}

// Channels [c, c + V * N) of tile k.
template <int T, int V, int N, typename S>
inline void forward_tile(const S* x, const float* weight, const float* bias, S* y, const Tables& t, const Geometry& g,
                         int64_t k, int64_t c) {
    const int ty = t.keep[k] / g.gw, tx = t.keep[k] % g.gw;
    for (int row = 0; row < T; ++row) {
        vec<N> acc[T][V];
        for (int v = 0; v < V; ++v) {
            const vec<N> start = bias ? load<N>(bias + c + v * N) : vec<N>{};
            for (int o = 0; o < T; ++o) acc[o][v] = start;
        }
        for (int ky = 0; ky < 7; ++ky)
            neighbours<T>(x + c, t, g, ty, tx, row, ky, [&](auto dx, const S* input) {
                taps<T, V, N, dx()>(acc, input, weight + ky * 7 * g.channels + c, g.channels);
            });
        S* out = y + (k * T + row) * T * g.channels + c;
        for (int o = 0; o < T; ++o)
            for (int v = 0; v < V; ++v) store<N>(out + o * g.channels + v * N, acc[o][v]);
    }
}

// One image, channels [first, end).
template <int T, typename S>
void forward(const S* x, const float* weight, const float* bias, S* y, const Tables& t, const Geometry& g,
             int64_t first, int64_t end) {
    over_blocks<VECTORS, WIDTH>(first, end, [&](int64_t c, auto vectors, auto lanes) {
        constexpr int V = depth(T, vectors()), N = lanes();
        for (int64_t k = 0; k < g.keep; ++k)
            for (int v = 0; v < vectors(); v += V) forward_tile<T, V, N>(x, weight, bias, y, t, g, k, c + v * N);
    });
}

// Sum over the outputs o of a row: acc[kx] += x[j] * grad[o].
template <int T, int N, int DX, typename S>
inline void grad_taps(vec<N> (&acc)[7], const S* x, const vec<N> (&grad)[T], int64_t channels) {
#pragma GCC unroll 8
    for (int j = 0; j < T; ++j) {
        if (DX * T + j - (T - 1) > 3 || DX * T + j < -3) continue;
        const auto pixel = load<N>(x + j * channels);
#pragma GCC unroll 8
        for (int o = 0; o < T; ++o) {
            const int kx = DX * T + j - o + 3;
            if (kx >= 0 && kx <= 6) acc[kx] += pixel * grad[o];
        }
    }
}

// Tile k's part in the 49 taps and the bias, added to total: a sum per tile first, because shorter sums round less.
template <int T, int N, typename S>
inline void weight_grad_tile(const S* x, const S* grad, vec<N> (&total)[50], const Tables& t, const Geometry& g, int64_t k,
                             int64_t c) {
    const int ty = t.keep[k] / g.gw, tx = t.keep[k] % g.gw;
    const S* own = grad + k * T * T * g.channels + c;
    vec<N> bias{};
    for (int o = 0; o < T * T; ++o) bias += load<N>(own + o * g.channels);
    total[49] += bias;
    for (int ky = 0; ky < 7; ++ky) {
        vec<N> acc[7] = {};
        for (int row = 0; row < T; ++row) {
            vec<N> go[T];
            for (int o = 0; o < T; ++o) go[o] = load<N>(own + (row * T + o) * g.channels);
            neighbours<T>(x + c, t, g, ty, tx, row, ky, [&](auto dx, const S* input) {
                grad_taps<T, N, dx()>(acc, input, go, g.channels);
            });
        }
        for (int kx = 0; kx < 7; ++kx) total[ky * 7 + kx] += acc[kx];
    }
}

// One image, channels [first, end): partial (50, C).
template <int T, typename S>
void weight_grad(const S* x, const S* grad, float* partial, const Tables& t, const Geometry& g, int64_t first,
                 int64_t end) {
    over_blocks<VECTORS, WIDTH>(first, end, [&](int64_t c, auto vectors, auto lanes) {
        constexpr int V = vectors(), N = lanes();
        vec<N> total[V][50] = {};
        for (int64_t k = 0; k < g.keep; ++k)
            for (int v = 0; v < V; ++v) weight_grad_tile<T, N>(x, grad, total[v], t, g, k, c + v * N);
        for (int v = 0; v < V; ++v)
            for (int tap = 0; tap < 50; ++tap) store<N>(partial + tap * g.channels + c + v * N, total[v][tap]);
    });
}

}  // namespace fcmae::rows
