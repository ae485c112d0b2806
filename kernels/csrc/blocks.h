// How the work of a convolution is cut into items of one image and some channels, and those into blocks of vectors.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace fcmae {

template <int Value>
using Constant = std::integral_constant<int, Value>;

struct Geometry {
    int64_t images, keep, gh, gw, channels;
    int threads;
};

// One image: its visible regions (K,), and the slots (gh, gw), -1 where masked.
struct Tables {
    const int64_t *keep, *slot;
    Tables of(const Geometry& g, int64_t image) const { return {keep + image * g.keep, slot + image * g.gh * g.gw}; }
};

// body(image, first channel, end) in parallel. Items are small enough to balance and large enough to amortize the tables.
template <typename Body>
void over_items(const Geometry& g, Body body) {
    const int64_t vectors = (g.channels + WIDTH - 1) / WIDTH;
    const int64_t wanted = std::max<int64_t>(1, (4 * g.threads + g.images - 1) / g.images);
    const int64_t size = std::max<int64_t>(8, (vectors + wanted - 1) / wanted) * WIDTH;
    const int64_t parts = (g.channels + size - 1) / size;
#pragma omp parallel for num_threads(g.threads) schedule(static)
    for (int64_t i = 0; i < g.images * parts; ++i) {
        const int64_t first = i % parts * size;
        body(i / parts, first, std::min(first + size, g.channels));
    }
}

// body(c, vectors, lanes) for channels [c, c + vectors * lanes), both constants, until `end`: full width first.
template <int V, int N, typename Body>
inline void over_blocks(int64_t c, int64_t end, Body body) {
    for (; c + V * N <= end; c += V * N) body(c, Constant<V>(), Constant<N>());
    if constexpr (V > 1) over_blocks<V / 2, N>(c, end, body);
    else if constexpr (N > 1) over_blocks<1, (N > 4 ? N / 2 : 1)>(c, end, body);
}

}  // namespace fcmae
