// The passes between the matrix products of a ConvNeXt V2 block; see kernels/reference.py.
//
// h, grad, a, slopes: (G, n, F); the last two stay in the caches between two passes, where computing them again would take
// longer than reading them. A thread takes RUN rows of a group at a time; each run leaves its own sums (G, runs, F), which
// the caller adds in order: bitwise repeatable whatever the threads, and short sums round less.

#include <algorithm>

#include "gelu.h"
#include "vec.h"

using namespace fcmae;

namespace {

constexpr int N = WIDTH;
constexpr int64_t RUN = 64;

struct Rows {
    int64_t groups, rows, features;
    int threads;
};

// body(offset in the tensors, in the (G, F) factors, in the sums of runs, in (F,) factors, lanes in use), for each vector
// of features in each row; the sums begin at zero.
template <typename Body>
inline void over_rows(const Rows& s, std::initializer_list<float*> sums, Body body) {
    const int64_t runs = (s.rows + RUN - 1) / RUN, full = s.features / N * N;
    const int rest = int(s.features - full);
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t i = 0; i < s.groups * runs; ++i) {
        const int64_t group = i / runs, first = i % runs * RUN, end = std::min(first + RUN, s.rows);
        const int64_t column = group * s.features, own = i * s.features;
        for (float* sum : sums) std::fill_n(sum + own, s.features, 0.f);
        for (int64_t r = first; r < end; ++r) {
            const int64_t row = (group * s.rows + r) * s.features;
            for (int64_t f = 0; f < full; f += N) body(row + f, column + f, own + f, f, N);
            if (rest) body(row + full, column + full, own + full, full, rest);
        }
    }
}

inline void add(float* sum, vec<N> x, int lanes) { store<N>(sum, load<N>(sum, lanes) + x, lanes); }

// a: gelu(h + bias), for gelu_affine.
template <typename S>
void gelu_squares(const S* h, const float* bias, S* a, float* squares, const Rows& s) {
    over_rows(s, {squares}, [=](int64_t at, int64_t, int64_t own, int64_t f, int lanes) {
        const vec<N> value = Gelu<N>(load<N>(h + at, lanes) + load<N>(bias + f, lanes)).value();
        store<N>(a + at, value, lanes);
        add(squares + own, value * value, lanes);
    });
}

// a becomes a * scale + shift.
template <typename S>
void gelu_affine(S* a, const float* scale, const float* shift, const Rows& s) {
    over_rows(s, {}, [=](int64_t at, int64_t column, int64_t, int64_t f, int lanes) {
        store<N>(a + at, load<N>(a + at, lanes) * load<N>(scale + column, lanes) + load<N>(shift + f, lanes), lanes);
    });
}

// a: gelu(h + bias), slopes: its derivative, for gelu_affine_backward.
template <typename S>
void gelu_affine_sums(const S* h, const float* bias, const S* grad, S* a, S* slopes, float* products,
                      float* totals, const Rows& s) {
    over_rows(s, {products, totals}, [=](int64_t at, int64_t, int64_t own, int64_t f, int lanes) {
        const Gelu<N> gelu(load<N>(h + at, lanes) + load<N>(bias + f, lanes));
        const vec<N> value = gelu.value(), d = load<N>(grad + at, lanes);
        store<N>(a + at, value, lanes);
        store<N>(slopes + at, gelu.slope(), lanes);
        add(products + own, d * value, lanes);
        add(totals + own, d, lanes);
    });
}

// grad becomes the gradient of h, a becomes a * scale + shift.
template <typename S>
void gelu_affine_backward(S* grad, S* a, const S* slopes, const float* scale, const float* shift, const float* slope,
                          float* totals, const Rows& s) {
    over_rows(s, {totals}, [=](int64_t at, int64_t column, int64_t own, int64_t f, int lanes) {
        const vec<N> value = load<N>(a + at, lanes), by = load<N>(scale + column, lanes);
        const vec<N> da = load<N>(grad + at, lanes) * by + value * load<N>(slope + column, lanes);
        const vec<N> dh = da * load<N>(slopes + at, lanes);
        store<N>(grad + at, dh, lanes);
        store<N>(a + at, value * by + load<N>(shift + f, lanes), lanes);
        add(totals + own, dh, lanes);
    });
}

// dy: the gradient of LayerNorm's input; normed: its output once more; sums: (runs, 2, C), the gradients of weight and bias.
void layer_norm_backward(const float* grad, const float* y, const float* mean, const float* rstd, const float* weight,
                         const float* bias, float* dy, float* normed, float* sums, int64_t rows, int64_t c, int threads) {
    const int64_t runs = (rows + RUN - 1) / RUN;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < runs; ++i) {
        float* own = sums + i * 2 * c;
        std::fill_n(own, 2 * c, 0.f);
        for (int64_t r = i * RUN; r < std::min(i * RUN + RUN, rows); ++r) {
            const float m = mean[r], s = rstd[r];
            vec<N> plain{}, along{};  // of the scaled gradient: its sum, and its product with the unit row
            for (int64_t f = 0; f < c; f += N) {
                const int lanes = int(std::min<int64_t>(N, c - f));
                const vec<N> d = load<N>(grad + r * c + f, lanes), w = load<N>(weight + f, lanes);
                const vec<N> unit = (load<N>(y + r * c + f, lanes) - m) * s;
                plain += d * w;
                along += d * w * unit;
                add(own + f, d * unit, lanes);
                add(own + c + f, d, lanes);
                store<N>(normed + r * c + f, unit * w + load<N>(bias + f, lanes), lanes);
            }
            const float shift = sum<N>(plain) / float(c), slope = sum<N>(along) / float(c);
            for (int64_t f = 0; f < c; f += N) {
                const int lanes = int(std::min<int64_t>(N, c - f));
                const vec<N> unit = (load<N>(y + r * c + f, lanes) - m) * s;
                const vec<N> g = load<N>(grad + r * c + f, lanes) * load<N>(weight + f, lanes);
                store<N>(dy + r * c + f, (g - shift - unit * slope) * s, lanes);
            }
        }
    }
}

}  // namespace

// storage: 0 fp32, 1 bf16, 2 fp16 for h, grad, a and slopes; everything else is fp32. Returns 0, or 1 for another storage.
#define FOR_STORAGE(CALL)                            \
    const Rows s{groups, rows, features, threads};   \
    switch (storage) {                               \
        case 0: { using S = float; CALL; return 0; } \
        case 1: { using S = bf16; CALL; return 0; }  \
        case 2: { using S = fp16; CALL; return 0; }  \
    }                                                \
    return 1;
#define IN(p) static_cast<const S*>(p)
#define OUT(p) static_cast<S*>(p)
#define SHAPE int64_t groups, int64_t rows, int64_t features, int storage, int threads

extern "C" {

int fcmae_gelu_squares(const void* h, const float* bias, void* a, float* squares, SHAPE) {
    FOR_STORAGE(gelu_squares(IN(h), bias, OUT(a), squares, s))
}

int fcmae_gelu_affine(void* a, const float* scale, const float* shift, SHAPE) {
    FOR_STORAGE(gelu_affine(OUT(a), scale, shift, s))
}

int fcmae_gelu_affine_sums(const void* h, const float* bias, const void* grad, void* a, void* slopes, float* products,
                           float* totals, SHAPE) {
    FOR_STORAGE(gelu_affine_sums(IN(h), bias, IN(grad), OUT(a), OUT(slopes), products, totals, s))
}

int fcmae_gelu_affine_backward(void* grad, void* a, const void* slopes, const float* scale, const float* shift,
                               const float* slope, float* totals, SHAPE) {
    FOR_STORAGE(gelu_affine_backward(OUT(grad), OUT(a), IN(slopes), scale, shift, slope, totals, s))
}

int fcmae_layer_norm_backward(const float* grad, const float* y, const float* mean, const float* rstd,
                              const float* weight, const float* bias, float* dy, float* normed, float* sums,
                              int64_t rows, int64_t c, int storage, int threads) {
    if (storage) return 1;
    layer_norm_backward(grad, y, mean, rstd, weight, bias, dy, normed, sums, rows, c, threads);
    return 0;
}
}
