// Depthwise 7x7 convolution on packed visible tiles, channels-last, and its weight gradient; see kernels/reference.py.
//
// x, y, grad: (B, K, T, T, C) of fp32, bf16 or fp16 (S); all sums in fp32. weight: (49, C), taps row-major. slot: (B, gh,
// gw), the place of a visible tile or -1. A masked neighbour is skipped, never read or multiplied.

#include "pixel_pairs.h"
#include "tile_rows.h"

using namespace fcmae;

namespace {

template <int T, typename S>
void forward(const S* x, const float* weight, const float* bias, S* y, const Tables& tables, const Geometry& g) {
    const int64_t size = g.keep * T * T * g.channels;
    over_items(g, [=, &g](int64_t image, int64_t first, int64_t end) {
        const S* in = x + image * size;
        if constexpr (T >= 4) rows::forward<T>(in, weight, bias, y + image * size, tables.of(g, image), g, first, end);
        else pairs::forward<T>(in, weight, bias, y + image * size, tables.of(g, image), g, first, end);
    });
}

// partial: (B, 50, C), summed over B by the caller, in order: bitwise repeatable whatever the threads.
template <int T, typename S>
void weight_grad(const S* x, const S* grad, float* partial, const Tables& tables, const Geometry& g) {
    const int64_t size = g.keep * T * T * g.channels;
    over_items(g, [=, &g](int64_t image, int64_t first, int64_t end) {
        const S *in = x + image * size, *out = grad + image * size;
        float* own = partial + image * 50 * g.channels;
        if constexpr (T >= 4) rows::weight_grad<T>(in, out, own, tables.of(g, image), g, first, end);
        else pairs::weight_grad<T>(in, out, own, tables.of(g, image), g, first, end);
    });
}

template <typename S>
int forward_any(int64_t tile, const S* x, const float* weight, const float* bias, S* y, const Tables& t,
                const Geometry& g) {
    switch (tile) {
        case 8: forward<8>(x, weight, bias, y, t, g); return 0;
        case 4: forward<4>(x, weight, bias, y, t, g); return 0;
        case 2: forward<2>(x, weight, bias, y, t, g); return 0;
        case 1: forward<1>(x, weight, bias, y, t, g); return 0;
    }
    return 1;
}

template <typename S>
int weight_grad_any(int64_t tile, const S* x, const S* grad, float* partial, const Tables& t, const Geometry& g) {
    switch (tile) {
        case 8: weight_grad<8>(x, grad, partial, t, g); return 0;
        case 4: weight_grad<4>(x, grad, partial, t, g); return 0;
        case 2: weight_grad<2>(x, grad, partial, t, g); return 0;
        case 1: weight_grad<1>(x, grad, partial, t, g); return 0;
    }
    return 1;
}

}  // namespace

// storage of x, y and grad: 0 fp32, 1 bf16, 2 fp16. Returns 0, or 1 for a tile size or storage without a kernel.
#define FOR_STORAGE(CALL)                                         \
    const Geometry g{images, visible, gh, gw, channels, threads}; \
    const Tables tables{keep, slot};                              \
    switch (storage) {                                            \
        case 0: { using S = float; return CALL; }                 \
        case 1: { using S = bf16; return CALL; }                  \
        case 2: { using S = fp16; return CALL; }                  \
    }                                                             \
    return 1;
#define IN(p) static_cast<const S*>(p)
#define OUT(p) static_cast<S*>(p)
#define SHAPE                                                                                               \
    const int64_t *keep, const int64_t *slot, int64_t images, int64_t visible, int64_t gh, int64_t gw,      \
        int64_t channels, int64_t tile, int storage, int threads

extern "C" {

int fcmae_tile_conv(const void* x, const float* weight, const float* bias, void* y, SHAPE) {
    FOR_STORAGE(forward_any(tile, IN(x), weight, bias, OUT(y), tables, g))
}

int fcmae_tile_conv_weight_grad(const void* x, const void* grad, float* partial, SHAPE) {
    FOR_STORAGE(weight_grad_any(tile, IN(x), IN(grad), partial, tables, g))
}
}
