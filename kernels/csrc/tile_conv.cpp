// Depthwise 7x7 convolution on packed visible tiles, fp32, channels-last, and its weight gradient.
//
// x, y, grad: (B, K, T, T, C). weight: (49, C), taps row-major. slot: (B, gh, gw), the place of a visible tile or -1.
// A masked neighbour is skipped, never read or multiplied. One row of a tile (T pixels) times V vectors of channels stays
// in registers over all taps; for small T more channels fill them. Compiled once for each instruction set.

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifndef FCMAE_BYTES
#define FCMAE_BYTES 16  // of one vector register
#endif

namespace {

template <int N>
struct Lanes {
    typedef float type __attribute__((vector_size(N * 4)));
};
template <>
struct Lanes<1> {
    typedef float type;
};

template <int N>
inline typename Lanes<N>::type load(const float* p) {
    typename Lanes<N>::type v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <int N>
inline void store(float* p, typename Lanes<N>::type v) {
    std::memcpy(p, &v, sizeof v);
}

struct Geometry {
    int64_t images, keep, gh, gw, channels;
};

constexpr int reach(int t) { return (3 + t - 1) / t; }  // tiles that a halo of 3 pixels spans

inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Visits the visible tiles that row `row` of output tile (ty, tx) needs for tap row ky.
// body(dx, input): dx the tile's column offset, input the first pixel of the row it contributes.
template <int T, typename Body>
inline void neighbours(const float* x, const int64_t* slot, const Geometry& g, int ty, int tx, int row, int ky, Body body) {
    const int iy = row + ky - 3, dy = floor_div(iy, T), inner = iy - dy * T;
    const int ny = ty + dy;
    if (ny < 0 || ny >= g.gh) return;
    const int first = std::max(-reach(T), -tx), last = std::min<int>(reach(T), g.gw - 1 - tx);
    for (int dx = first; dx <= last; ++dx) {
        const int64_t s = slot[ny * g.gw + tx + dx];
        if (s >= 0) body(dx, x + ((s * T + inner) * T) * g.channels);
    }
}

// acc[o] += x[j] * w[kx] for every pixel j of a tile DX columns away and every output o it reaches.
template <int T, int V, int N, int DX>
inline void taps(typename Lanes<N>::type (&acc)[T][V], const float* x, const float* w, int64_t channels) {
    using vec = typename Lanes<N>::type;
#pragma GCC unroll 8
    for (int j = 0; j < T; ++j) {
        if (DX * T + j - (T - 1) > 3 || DX * T + j < -3) continue;
        vec pixel[V];
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

template <int T, int V, int N>
inline void dispatch(int dx, typename Lanes<N>::type (&acc)[T][V], const float* x, const float* w, int64_t channels) {
    switch (dx) {
        case -3: if constexpr (reach(T) >= 3) taps<T, V, N, -3>(acc, x, w, channels); break;
        case -2: if constexpr (reach(T) >= 2) taps<T, V, N, -2>(acc, x, w, channels); break;
        case -1: taps<T, V, N, -1>(acc, x, w, channels); break;
        case 0: taps<T, V, N, 0>(acc, x, w, channels); break;
        case 1: taps<T, V, N, 1>(acc, x, w, channels); break;
        case 2: if constexpr (reach(T) >= 2) taps<T, V, N, 2>(acc, x, w, channels); break;
        case 3: if constexpr (reach(T) >= 3) taps<T, V, N, 3>(acc, x, w, channels); break;
    }
}

// One image, channels [c, c + V*N).
template <int T, int V, int N>
void forward_image(const float* x, const float* weight, const float* bias, float* y, const int64_t* keep,
                   const int64_t* slot, const Geometry& g, int64_t c) {
    using vec = typename Lanes<N>::type;
    for (int64_t k = 0; k < g.keep; ++k) {
        const int ty = keep[k] / g.gw, tx = keep[k] % g.gw;
        for (int row = 0; row < T; ++row) {
            vec acc[T][V];
            for (int v = 0; v < V; ++v) {
                const vec start = bias ? load<N>(bias + c + v * N) : vec{};
                for (int o = 0; o < T; ++o) acc[o][v] = start;
            }
            for (int ky = 0; ky < 7; ++ky)
                neighbours<T>(x + c, slot, g, ty, tx, row, ky, [&](int dx, const float* input) {
                    dispatch<T, V, N>(dx, acc, input, weight + ky * 7 * g.channels + c, g.channels);
                });
            float* out = y + ((k * T + row) * T) * g.channels + c;
            for (int o = 0; o < T; ++o)
                for (int v = 0; v < V; ++v) store<N>(out + o * g.channels + v * N, acc[o][v]);
        }
    }
}

// sum over the outputs o of a row: acc[kx] += x[j] * grad[o].
template <int T, int N, int DX>
inline void grad_taps(typename Lanes<N>::type (&acc)[7], const float* x, const typename Lanes<N>::type (&grad)[T],
                      int64_t channels) {
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

// One image, channels [c, c + N): partial sums (50, C) of the 49 taps and the bias.
template <int T, int N>
void weight_grad_image(const float* x, const float* grad, float* partial, const int64_t* keep, const int64_t* slot,
                       const Geometry& g, int64_t c) {
    using vec = typename Lanes<N>::type;
    vec bias{};
    for (int ky = 0; ky < 7; ++ky) {
        vec total[7] = {};
        for (int64_t k = 0; k < g.keep; ++k) {
            const int ty = keep[k] / g.gw, tx = keep[k] % g.gw;
            vec acc[7] = {}, tile_bias{};  // a sum per tile first: shorter sums round less
            for (int row = 0; row < T; ++row) {
                vec go[T];
                for (int o = 0; o < T; ++o) go[o] = load<N>(grad + ((k * T + row) * T + o) * g.channels + c);
                if (ky == 0)
                    for (int o = 0; o < T; ++o) tile_bias += go[o];
                neighbours<T>(x + c, slot, g, ty, tx, row, ky, [&](int dx, const float* input) {
                    switch (dx) {
                        case -3: if constexpr (reach(T) >= 3) grad_taps<T, N, -3>(acc, input, go, g.channels); break;
                        case -2: if constexpr (reach(T) >= 2) grad_taps<T, N, -2>(acc, input, go, g.channels); break;
                        case -1: grad_taps<T, N, -1>(acc, input, go, g.channels); break;
                        case 0: grad_taps<T, N, 0>(acc, input, go, g.channels); break;
                        case 1: grad_taps<T, N, 1>(acc, input, go, g.channels); break;
                        case 2: if constexpr (reach(T) >= 2) grad_taps<T, N, 2>(acc, input, go, g.channels); break;
                        case 3: if constexpr (reach(T) >= 3) grad_taps<T, N, 3>(acc, input, go, g.channels); break;
                    }
                });
            }
            for (int kx = 0; kx < 7; ++kx) total[kx] += acc[kx];
            bias += tile_bias;
        }
        for (int kx = 0; kx < 7; ++kx) store<N>(partial + (ky * 7 + kx) * g.channels + c, total[kx]);
    }
    store<N>(partial + 49 * g.channels + c, bias);
}

constexpr int WIDTH = FCMAE_BYTES / 4;

// Vectors of channels that a row of T pixels leaves registers for (16 of them, AVX2).
constexpr int depth(int t) { return t >= 8 ? 1 : t == 4 ? 2 : 4; }

template <int T, int V, int N>
int64_t forward_blocks(const float* x, const float* weight, const float* bias, float* y, const int64_t* keep,
                       const int64_t* slot, const Geometry& g, int64_t c, int64_t end) {
    for (; c + V * N <= end; c += V * N) forward_image<T, V, N>(x, weight, bias, y, keep, slot, g, c);
    if constexpr (V > 1) return forward_blocks<T, V / 2, N>(x, weight, bias, y, keep, slot, g, c, end);
    else if constexpr (N > 1) return forward_blocks<T, 1, (N > 4 ? N / 2 : 1)>(x, weight, bias, y, keep, slot, g, c, end);
    return c;
}

template <int T, int N>
void weight_grad_blocks(const float* x, const float* grad, float* partial, const int64_t* keep, const int64_t* slot,
                        const Geometry& g, int64_t c, int64_t end) {
    for (; c + N <= end; c += N) weight_grad_image<T, N>(x, grad, partial, keep, slot, g, c);
    if constexpr (N > 1) weight_grad_blocks<T, (N > 4 ? N / 2 : 1)>(x, grad, partial, keep, slot, g, c, end);
}

// Work is cut into (image, block of channels); small enough to balance, large enough to amortize the tables.
struct Cut {
    int64_t block, blocks;
    Cut(const Geometry& g, int threads) {
        const int64_t vectors = (g.channels + WIDTH - 1) / WIDTH;
        const int64_t wanted = std::max<int64_t>(1, (4 * threads + g.images - 1) / g.images);
        const int64_t per = std::max<int64_t>(4, (vectors + wanted - 1) / wanted);
        block = per * WIDTH;
        blocks = (g.channels + block - 1) / block;
    }
};

template <int T>
void forward(const float* x, const float* weight, const float* bias, float* y, const int64_t* keep, const int64_t* slot,
             const Geometry& g, int threads) {
    const Cut cut(g, threads);
    const int64_t size = g.keep * T * T * g.channels;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < g.images * cut.blocks; ++i) {
        const int64_t b = i / cut.blocks, c = i % cut.blocks * cut.block;
        forward_blocks<T, depth(T), WIDTH>(x + b * size, weight, bias, y + b * size, keep + b * g.keep,
                                           slot + b * g.gh * g.gw, g, c, std::min(c + cut.block, g.channels));
    }
}

template <int T>
void weight_grad(const float* x, const float* grad, float* partial, const int64_t* keep, const int64_t* slot,
                 const Geometry& g, int threads) {
    const Cut cut(g, threads);
    const int64_t size = g.keep * T * T * g.channels;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < g.images * cut.blocks; ++i) {
        const int64_t b = i / cut.blocks, c = i % cut.blocks * cut.block;
        weight_grad_blocks<T, WIDTH>(x + b * size, grad + b * size, partial + b * 50 * g.channels, keep + b * g.keep,
                                     slot + b * g.gh * g.gw, g, c, std::min(c + cut.block, g.channels));
    }
}

}  // namespace

extern "C" {

// Returns 0, or 1 for a tile size without a kernel.
int fcmae_tile_conv(const float* x, const float* weight, const float* bias, float* y, const int64_t* keep,
                    const int64_t* slot, int64_t images, int64_t visible, int64_t gh, int64_t gw, int64_t channels,
                    int tile, int threads) {
    const Geometry g{images, visible, gh, gw, channels};
    switch (tile) {
        case 8: forward<8>(x, weight, bias, y, keep, slot, g, threads); return 0;
        case 4: forward<4>(x, weight, bias, y, keep, slot, g, threads); return 0;
        case 2: forward<2>(x, weight, bias, y, keep, slot, g, threads); return 0;
        case 1: forward<1>(x, weight, bias, y, keep, slot, g, threads); return 0;
    }
    return 1;
}

// partial: (B, 50, C), summed over B by the caller, in order: bitwise repeatable whatever the threads.
int fcmae_tile_conv_weight_grad(const float* x, const float* grad, float* partial, const int64_t* keep,
                                const int64_t* slot, int64_t images, int64_t visible, int64_t gh, int64_t gw,
                                int64_t channels, int tile, int threads) {
    const Geometry g{images, visible, gh, gw, channels};
    switch (tile) {
        case 8: weight_grad<8>(x, grad, partial, keep, slot, g, threads); return 0;
        case 4: weight_grad<4>(x, grad, partial, keep, slot, g, threads); return 0;
        case 2: weight_grad<2>(x, grad, partial, keep, slot, g, threads); return 0;
        case 1: weight_grad<1>(x, grad, partial, keep, slot, g, threads); return 0;
    }
    return 1;
}
}
