// The passes between the matrix products of a ConvNeXt V2 block; see kernels/reference.py.
//
// h, grad, z: (G, n, F). GRN's sums over a group's rows part the work into two passes; what the first has computed waits in
// z and slopes for the second, because reading it from the caches is quicker than computing it again. A thread takes RUN
// rows of a group at a time and leaves their sums (G, runs, F), which are added in order: bitwise repeatable whatever the
// threads, and short sums round less.

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "gelu.h"
#include "vec.h"

using namespace fcmae;

#define IN(p) static_cast<const S*>(p)
#define OUT(p) static_cast<S*>(p)

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

// Sums of the runs, in order: out (G, F) of parts (G, runs, F).
void add_runs(const float* parts, float* out, const Rows& s) {
    const int64_t runs = (s.rows + RUN - 1) / RUN;
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t g = 0; g < s.groups; ++g) {
        float* total = out + g * s.features;
        std::copy_n(parts + g * runs * s.features, s.features, total);
        for (int64_t r = 1; r < runs; ++r)
            for (int64_t f = 0; f < s.features; ++f) total[f] += parts[(g * runs + r) * s.features + f];
    }
}

constexpr float GRN_EPS = 1e-6f, TINY = 1e-24f;

float mean_norm(const float* squares, int64_t features) {
    double total = 0;
    for (int64_t f = 0; f < features; ++f) total += std::sqrt(squares[f] + TINY);
    return float(total / double(features)) + GRN_EPS;
}

// z = a * scale + beta with scale = 1 + gamma * norm / mean; z holds a between the passes.
template <typename S>
void gelu_grn(const S* h, const float* bias, const float* gamma, const float* beta, S* z, float* parts, float* scale,
              float* squares, const Rows& s) {
    over_rows(s, {parts}, [=](int64_t at, int64_t, int64_t own, int64_t f, int lanes) {
        const vec<N> a = Gelu<N>(load<N>(h + at, lanes) + load<N>(bias + f, lanes)).value();
        store<N>(z + at, a, lanes);
        add(parts + own, a * a, lanes);
    });
    add_runs(parts, squares, s);
    for (int64_t g = 0; g < s.groups; ++g) {
        const float* own = squares + g * s.features;
        const float mean = mean_norm(own, s.features);
        for (int64_t f = 0; f < s.features; ++f)
            scale[g * s.features + f] = 1.f + gamma[f] * (std::sqrt(own[f] + TINY) / mean);
    }
    over_rows(s, {}, [=](int64_t at, int64_t column, int64_t, int64_t f, int lanes) {
        store<N>(z + at, load<N>(z + at, lanes) * load<N>(scale + column, lanes) + load<N>(beta + f, lanes), lanes);
    });
}

// grad becomes the gradient of h. slopes: gelu's derivative between the passes. sums: (3, F), of bias, gamma and beta.
template <typename S>
void gelu_grn_backward(const S* h, const float* bias, const float* gamma, const float* beta, const float* squares,
                       S* grad, S* z, S* slopes, float* products, float* totals, float* scale, float* slope, float* sums,
                       const Rows& s) {
    over_rows(s, {products, totals}, [=](int64_t at, int64_t, int64_t own, int64_t f, int lanes) {
        const Gelu<N> gelu(load<N>(h + at, lanes) + load<N>(bias + f, lanes));
        const vec<N> a = gelu.value(), d = load<N>(grad + at, lanes);
        store<N>(z + at, a, lanes);
        store<N>(slopes + at, gelu.slope(), lanes);
        add(products + own, d * a, lanes);
        add(totals + own, d, lanes);
    });
    std::fill_n(sums, 3 * s.features, 0.f);
    float *d_bias = sums, *d_gamma = sums + s.features, *d_beta = sums + 2 * s.features;
    add_runs(products, slope, s);
    add_runs(totals, scale, s);
    for (int64_t g = 0; g < s.groups; ++g) {
        const float* own = squares + g * s.features;
        float *by = scale + g * s.features, *along = slope + g * s.features;  // hold the sums of totals and products
        const float mean = mean_norm(own, s.features);
        double shared = 0;
        for (int64_t f = 0; f < s.features; ++f) shared += double(gamma[f] * along[f]) * std::sqrt(own[f] + TINY) / mean;
        const float common = float(shared / double(s.features));
        for (int64_t f = 0; f < s.features; ++f) {
            const float norm = std::sqrt(own[f] + TINY), response = norm / mean;
            d_gamma[f] += along[f] * response;
            d_beta[f] += by[f];
            along[f] = (gamma[f] * along[f] - common) / (mean * norm);
            by[f] = 1.f + gamma[f] * response;
        }
    }
    over_rows(s, {totals}, [=](int64_t at, int64_t column, int64_t own, int64_t f, int lanes) {
        const vec<N> a = load<N>(z + at, lanes), by = load<N>(scale + column, lanes);
        const vec<N> da = load<N>(grad + at, lanes) * by + a * load<N>(slope + column, lanes);
        const vec<N> dh = da * load<N>(slopes + at, lanes);
        store<N>(grad + at, dh, lanes);
        store<N>(z + at, a * by + load<N>(beta + f, lanes), lanes);
        add(totals + own, dh, lanes);
    });
    add_runs(totals, products, s);
    for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t f = 0; f < s.features; ++f) d_bias[f] += products[g * s.features + f];
}

// S: of grad and normed, Y: of y and dy. dy: the gradient of LayerNorm's input; normed: its output once more; sums: (runs, 2, C), the gradients of weight and bias.
template <typename S, typename Y>
int layer_norm_backward(const S* grad, const Y* y, const float* mean, const float* rstd, const float* weight,
                         const float* bias, Y* dy, S* normed, float* sums, int64_t rows, int64_t c, int threads) {
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
    return 0;
}

template <typename S, typename... Rest>
int layer_norm_backward_any(int storage_y, const void* grad, const void* y, const float* mean, const float* rstd,
                            const float* weight, const float* bias, void* dy, void* normed, Rest... rest) {
    const auto run = [&](auto* typed, auto* gradient) {
        return layer_norm_backward(IN(grad), typed, mean, rstd, weight, bias, gradient, OUT(normed), rest...);
    };
    switch (storage_y) {
        case 0: return run(static_cast<const float*>(y), static_cast<float*>(dy));
        case 1: return run(static_cast<const bf16*>(y), static_cast<bf16*>(dy));
        case 2: return run(static_cast<const fp16*>(y), static_cast<fp16*>(dy));
    }
    return 1;
}

}  // namespace

// storage: 0 fp32, 1 bf16, 2 fp16 for h, grad, z and slopes; everything else is fp32. Returns 0, or 1 for another storage.
#define FOR_STORAGE(CALL)                            \
    const Rows s{groups, rows, features, threads};   \
    switch (storage) {                               \
        case 0: { using S = float; CALL; return 0; } \
        case 1: { using S = bf16; CALL; return 0; }  \
        case 2: { using S = fp16; CALL; return 0; }  \
    }                                                \
    return 1;
#define SHAPE int64_t groups, int64_t rows, int64_t features, int storage, int threads

extern "C" {

int fcmae_gelu_grn(const void* h, const float* bias, const float* gamma, const float* beta, void* z, float* parts,
                   float* scale, float* squares, SHAPE) {
    FOR_STORAGE(gelu_grn(IN(h), bias, gamma, beta, OUT(z), parts, scale, squares, s))
}

int fcmae_gelu_grn_backward(const void* h, const float* bias, const float* gamma, const float* beta,
                            const float* squares, void* grad, void* z, void* slopes, float* products, float* totals,
                            float* scale, float* slope, float* sums, SHAPE) {
    FOR_STORAGE(gelu_grn_backward(IN(h), bias, gamma, beta, squares, OUT(grad), OUT(z), OUT(slopes), products, totals,
                                  scale, slope, sums, s))
}

int fcmae_layer_norm_backward(const void* grad, const void* y, const float* mean, const float* rstd,
                              const float* weight, const float* bias, void* dy, void* normed, float* sums,
                              int64_t rows, int64_t c, int64_t storage_y, int storage, int threads) {
    switch (storage) {
        case 0: return layer_norm_backward_any<float>(int(storage_y), grad, y, mean, rstd, weight, bias, dy, normed, sums,
                                                      rows, c, threads);
        case 1: return layer_norm_backward_any<bf16>(int(storage_y), grad, y, mean, rstd, weight, bias, dy, normed, sums,
                                                     rows, c, threads);
        case 2: return layer_norm_backward_any<fp16>(int(storage_y), grad, y, mean, rstd, weight, bias, dy, normed, sums,
                                                     rows, c, threads);
    }
    return 1;
}
}
