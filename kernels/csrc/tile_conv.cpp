// Depthwise 7x7 convolution on packed visible tiles, channels-last, and its weight gradient.
//
// x, y, grad: (B, K, T, T, C) of fp32, bf16 or fp16 (S); all sums in fp32. weight: (49, C), taps row-major. slot: (B, gh,
// gw), the place of a visible tile or -1. A masked neighbour is skipped, never read or multiplied. One row of a tile (T
// pixels) times V vectors of N channels stays in registers over all taps; for small T more channels fill them.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vec.h"

using namespace fcmae;

namespace {

template <int Value>
using Constant = std::integral_constant<int, Value>;

struct Geometry {
    int64_t images, keep, gh, gw, channels;
};

constexpr int reach(int t) { return (3 + t - 1) / t; }  // tiles that a halo of 3 pixels spans

inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Visits the visible tiles that row `row` of output tile (ty, tx) needs for tap row ky.
// body(dx, input): dx the tile's column offset, input the first pixel of the row it contributes.
template <int T, typename S, typename Body>
inline void neighbours(const S* x, const int64_t* slot, const Geometry& g, int ty, int tx, int row, int ky, Body body) {
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

// body(dx as a constant), for a column offset that a halo can have.
template <int T, typename Body>
inline void dispatch(int dx, Body body) {
    switch (dx) {
        case -3: if constexpr (reach(T) >= 3) body(Constant<-3>()); break;
        case -2: if constexpr (reach(T) >= 2) body(Constant<-2>()); break;
        case -1: body(Constant<-1>()); break;
        case 0: body(Constant<0>()); break;
        case 1: body(Constant<1>()); break;
        case 2: if constexpr (reach(T) >= 2) body(Constant<2>()); break;
        case 3: if constexpr (reach(T) >= 3) body(Constant<3>()); break;
    }
}

// One image, channels [c, c + V*N).
template <int T, int V, int N, typename S>
void forward_image(const S* x, const float* weight, const float* bias, S* y, const int64_t* keep,
                   const int64_t* slot, const Geometry& g, int64_t c) {
    for (int64_t k = 0; k < g.keep; ++k) {
        const int ty = keep[k] / g.gw, tx = keep[k] % g.gw;
        for (int row = 0; row < T; ++row) {
            vec<N> acc[T][V];
            for (int v = 0; v < V; ++v) {
                const vec<N> start = bias ? load<N>(bias + c + v * N) : vec<N>{};
                for (int o = 0; o < T; ++o) acc[o][v] = start;
            }
            for (int ky = 0; ky < 7; ++ky)
                neighbours<T>(x + c, slot, g, ty, tx, row, ky, [&](int dx, const S* input) {
                    dispatch<T>(dx, [&](auto offset) {
                        taps<T, V, N, offset()>(acc, input, weight + ky * 7 * g.channels + c, g.channels);
                    });
                });
            S* out = y + ((k * T + row) * T) * g.channels + c;
            for (int o = 0; o < T; ++o)
                for (int v = 0; v < V; ++v) store<N>(out + o * g.channels + v * N, acc[o][v]);
        }
    }
}

// sum over the outputs o of a row: acc[kx] += x[j] * grad[o].
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

// One image, channels [c, c + N): partial sums (50, C) of the 49 taps and the bias.
template <int T, int N, typename S>
void weight_grad_image(const S* x, const S* grad, float* partial, const int64_t* keep, const int64_t* slot,
                       const Geometry& g, int64_t c) {
    vec<N> bias{};
    for (int ky = 0; ky < 7; ++ky) {
        vec<N> total[7] = {};
        for (int64_t k = 0; k < g.keep; ++k) {
            const int ty = keep[k] / g.gw, tx = keep[k] % g.gw;
            vec<N> acc[7] = {}, tile_bias{};  // a sum per tile first: shorter sums round less
            for (int row = 0; row < T; ++row) {
                vec<N> go[T];
                for (int o = 0; o < T; ++o) go[o] = load<N>(grad + ((k * T + row) * T + o) * g.channels + c);
                if (ky == 0)
                    for (int o = 0; o < T; ++o) tile_bias += go[o];
                neighbours<T>(x + c, slot, g, ty, tx, row, ky, [&](int dx, const S* input) {
                    dispatch<T>(dx, [&](auto offset) { grad_taps<T, N, offset()>(acc, input, go, g.channels); });
                });
            }
            for (int kx = 0; kx < 7; ++kx) total[kx] += acc[kx];
            bias += tile_bias;
        }
        for (int kx = 0; kx < 7; ++kx) store<N>(partial + (ky * 7 + kx) * g.channels + c, total[kx]);
    }
    store<N>(partial + 49 * g.channels + c, bias);
}

// Vectors of channels that a row of T pixels leaves registers for (16 of them, AVX2).
constexpr int depth(int t) { return t >= 8 ? 1 : t == 4 ? 2 : 4; }

// body(c, vectors, lanes) for channels [c, c + vectors * lanes), both constants, until `end`: full width first.
template <int V, int N, typename Body>
void blocks(int64_t c, int64_t end, Body body) {
    for (; c + V * N <= end; c += V * N) body(c, Constant<V>(), Constant<N>());
    if constexpr (V > 1) blocks<V / 2, N>(c, end, body);
    else if constexpr (N > 1) blocks<1, (N > 4 ? N / 2 : 1)>(c, end, body);
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

// body(image, c, vectors, lanes), in parallel.
template <int V, typename Body>
void over_blocks(const Geometry& g, int threads, Body body) {
    const Cut cut(g, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < g.images * cut.blocks; ++i) {
        const int64_t b = i / cut.blocks, first = i % cut.blocks * cut.block;
        blocks<V, WIDTH>(first, std::min(first + cut.block, g.channels),
                         [&](int64_t c, auto vectors, auto lanes) { body(b, c, vectors, lanes); });
    }
}

template <int T, typename S>
void forward(const S* x, const float* weight, const float* bias, S* y, const int64_t* keep, const int64_t* slot,
             const Geometry& g, int threads) {
    const int64_t size = g.keep * T * T * g.channels;
    over_blocks<depth(T)>(g, threads, [=](int64_t b, int64_t c, auto vectors, auto lanes) {
        forward_image<T, vectors(), lanes()>(x + b * size, weight, bias, y + b * size, keep + b * g.keep,
                                             slot + b * g.gh * g.gw, g, c);
    });
}

template <int T, typename S>
void weight_grad(const S* x, const S* grad, float* partial, const int64_t* keep, const int64_t* slot, const Geometry& g,
                 int threads) {
    const int64_t size = g.keep * T * T * g.channels;
    over_blocks<1>(g, threads, [=](int64_t b, int64_t c, auto, auto lanes) {
        weight_grad_image<T, lanes()>(x + b * size, grad + b * size, partial + b * 50 * g.channels, keep + b * g.keep,
                                      slot + b * g.gh * g.gw, g, c);
    });
}

template <typename S>
int forward_any(int tile, const S* x, const float* weight, const float* bias, S* y, const int64_t* keep,
                const int64_t* slot, const Geometry& g, int threads) {
    switch (tile) {
        case 8: forward<8>(x, weight, bias, y, keep, slot, g, threads); return 0;
        case 4: forward<4>(x, weight, bias, y, keep, slot, g, threads); return 0;
        case 2: forward<2>(x, weight, bias, y, keep, slot, g, threads); return 0;
        case 1: forward<1>(x, weight, bias, y, keep, slot, g, threads); return 0;
    }
    return 1;
}

template <typename S>
int weight_grad_any(int tile, const S* x, const S* grad, float* partial, const int64_t* keep, const int64_t* slot,
                    const Geometry& g, int threads) {
    switch (tile) {
        case 8: weight_grad<8>(x, grad, partial, keep, slot, g, threads); return 0;
        case 4: weight_grad<4>(x, grad, partial, keep, slot, g, threads); return 0;
        case 2: weight_grad<2>(x, grad, partial, keep, slot, g, threads); return 0;
        case 1: weight_grad<1>(x, grad, partial, keep, slot, g, threads); return 0;
    }
    return 1;
}

}  // namespace

// storage of x, y and grad: 0 fp32, 1 bf16, 2 fp16. Returns 0, or 1 for a tile size or storage without a kernel.
#define FOR_STORAGE(CALL)                            \
    const Geometry g{images, visible, gh, gw, channels}; \
    switch (storage) {                               \
        case 0: { using S = float; return CALL; }    \
        case 1: { using S = bf16; return CALL; }     \
        case 2: { using S = fp16; return CALL; }     \
    }                                                \
    return 1;
#define IN(p) static_cast<const S*>(p)
#define OUT(p) static_cast<S*>(p)
#define SHAPE int64_t images, int64_t visible, int64_t gh, int64_t gw, int64_t channels, int64_t tile, int storage, int threads

extern "C" {

int fcmae_tile_conv(const void* x, const float* weight, const float* bias, void* y, const int64_t* keep,
                    const int64_t* slot, SHAPE) {
    FOR_STORAGE(forward_any(int(tile), IN(x), weight, bias, OUT(y), keep, slot, g, threads))
}

// partial: (B, 50, C), summed over B by the caller, in order: bitwise repeatable whatever the threads.
int fcmae_tile_conv_weight_grad(const void* x, const void* grad, float* partial, const int64_t* keep,
                                const int64_t* slot, SHAPE) {
    FOR_STORAGE(weight_grad_any(int(tile), IN(x), IN(grad), partial, keep, slot, g, threads))
}
}
