// Convolutions of stride 1 and "same" padding on maps of 1×1, 2×2 and 3×3 pixels, where most of a kernel would meet
// padding. A lane is a channel, so any batch fills the lanes. Builds on lanes.h.
//
//   maps x [B, S, S, I]    weight w [O, I, k, k]    bias [O]    output y [B, S, S, O]
//
// Along one axis y_p = Σ_q t_{q-p} x_q: a Toeplitz matrix of taps t times x. Of S² products Karatsuba's identity leaves
// E = 1, 3, 6 for S = 1, 2, 3: y = sums (kernel t * image x), * by elements. In a plane these are E² products for each
// pair of channels, 9 in the place of 16 for S = 2: E² matrix products [B, I] [I, O], whose terms are made where they
// are used, from weights that are read in place. Rounding errors are relative to a map's largest pixel, not to each one's.
#pragma once

#include "lanes.h"

namespace caps::cpu {

// ---- one axis: numbers -1, 0 and 1 ----------------------------------------------------------------------------------

template <int S>
struct Axis;
template <>
struct Axis<1> {
  static constexpr int8_t image[1][1] = {{1}}, kernel[1][1] = {{1}}, sums[1][1] = {{1}};
};
template <>
struct Axis<2> {
  static constexpr int8_t image[3][2] = {{1, 1}, {0, 1}, {1, 0}};
  static constexpr int8_t kernel[3][3] = {{0, 1, 0}, {0, -1, 1}, {1, -1, 0}};
  static constexpr int8_t sums[2][3] = {{1, 1, 0}, {1, 0, 1}};
};
template <>
struct Axis<3> {
  static constexpr int8_t image[6][3] = {{0, 0, 1}, {0, 1, 0}, {1, 0, 0}, {0, 1, -1}, {1, 0, -1}, {1, -1, 0}};
  static constexpr int8_t kernel[6][5] = {{0, 0, 1, 1, 1}, {0, 1, 1, 1, 0}, {1, 1, 1, 0, 0},
                                          {0, 0, 0, 1, 0}, {0, 0, 1, 0, 0}, {0, 1, 0, 0, 0}};
  static constexpr int8_t sums[3][6] = {{1, 0, 0, 1, 1, 0}, {0, 1, 0, -1, 0, 1}, {0, 0, 1, 0, -1, -1}};
};

// y[r] = Σ_c m[r][c] x[c], or of the transposed m; x and y with a step from one to the next.
template <bool transposed, class V, int rows, int columns>
[[gnu::always_inline]] inline void combine(const int8_t (&m)[rows][columns], const V* x, int x_step, V* y, int y_step) {
#pragma GCC unroll 6
  for (int r = 0; r < (transposed ? columns : rows); ++r) {
    V sum{};
    bool any = false;
#pragma GCC unroll 6
    for (int c = 0; c < (transposed ? rows : columns); ++c) {
      const int8_t number = transposed ? m[c][r] : m[r][c];
      if (number == 0) continue;
      const V term = number > 0 ? x[c * x_step] : -x[c * x_step];
      sum = any ? sum + term : term;
      any = true;
    }
    y[r * y_step] = sum;
  }
}

// The same along both axes of a plane.
template <bool transposed, class V, int rows, int columns>
[[gnu::always_inline]] inline void combine_plane(const int8_t (&m)[rows][columns], const V* x, V* y) {
  constexpr int from = transposed ? rows : columns, to = transposed ? columns : rows;
  V half[to * from];
#pragma GCC unroll 6
  for (int i = 0; i < from; ++i)
    combine<transposed>(m, x + i, from, half + i, from);
#pragma GCC unroll 6
  for (int i = 0; i < to; ++i)
    combine<transposed>(m, half + i * from, 1, y + i * to, 1);
}

// ---- matrix products ------------------------------------------------------------------------------------------------

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int most_rows = 8;  // 16 sums in 32 registers
#else
constexpr int most_rows = 6;  // 12 sums in 16
#endif
constexpr int tile = 2;  // vectors

// A matrix of numbers of which each is used for all lanes.
template <class T>
struct Factors {
  const T* start;
  int64_t row, column;  // steps
};

// c [R, tile] = a [R, depth] b [depth, tile], added to c unless it is `fresh`.
template <class T, int R>
inline void multiply_block(Factors<T> a, const Vec<T>* b, int64_t b_row, Vec<T>* c, int64_t depth, bool fresh) {
  Vec<T> x[R][tile];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < tile; ++v)
      x[r][v] = fresh ? Vec<T>{} : c[r * tile + v];
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> b0 = b[k * b_row], b1 = b[k * b_row + 1];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T factor = a.start[r * a.row + k * a.column];
      x[r][0] += factor * b0;
      x[r][1] += factor * b1;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < tile; ++v)
      c[r * tile + v] = x[r][v];
}

// f(number of rows as a type, first row) for blocks of nearly equal size: small ones would not fill the pipelines.
template <class F>
inline void for_blocks(int64_t rows, const F& f) {
  const int64_t blocks = (rows + most_rows - 1) / most_rows;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = rows * i / blocks, count = rows * (i + 1) / blocks - first;
    const auto choose = [&](auto self, auto R) -> void {
      if (count == R)
        f(R, first);
      else if constexpr (R > 1)
        self(self, Const<R - 1>());
    };
    choose(choose, Const<most_rows>());
  }
}

// ---- the convolution ------------------------------------------------------------------------------------------------

template <class T, int S>
struct SmallMapConv {
  static constexpr int L = lanes<T>, pixels = S * S, side = 2 * S - 1;
  static constexpr int E = int(std::size(Axis<S>::image)), products = E * E;
  static constexpr int64_t depth = 64, most_samples = 128;    // the terms of a task stay in L2
  static constexpr int64_t kernel_step = (depth + 1) * tile;  // + 1: no power of two, as below
  const int64_t B, I, O, k;
  const T* weight;

  // Channels are padded with zeros to whole tiles, and these to an odd number of them: at a stride of a power of two the
  // rows of a column would share a few lines of the cache.
  static int64_t tiles(int64_t channels) { return (channels + tile * L - 1) / (tile * L); }
  static int64_t vectors(int64_t channels) { return (tiles(channels) | 1) * tile; }
  int used(int64_t first, int64_t channels) const { return std::clamp<int64_t>(channels - first, 0, L); }

  // `count` gradients, or a vector of them, from `at` on; 0 where a ReLU, if its output is given, let nothing through.
  // As in torch NaN is let through.
  static Vec<T> load_passed(const T* grad, const T* output, int64_t at, int64_t count) {
    const Vec<T> g = load_some(grad + at, count);
    return output ? (load_some(output + at, count) <= 0 ? Vec<T>{} : g) : g;
  }

  // Maps [B, S, S, C] -> [E², B, C] by `f` of a plane of vectors; `output` as for load_passed.
  template <class F>
  void spread(const T* maps, const T* output, int64_t C, Vec<T>* to, const F& f) const {
    const int64_t width = vectors(C);
    torch::stable::parallel_for(0, B, 1 + 8192 / (pixels * C), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t v = 0; v < tiles(C) * tile; ++v) {
          Vec<T> x[pixels], y[products];
          for (int p = 0; p < pixels; ++p)
            x[p] = load_passed(maps, output, (b * pixels + p) * C + v * L, C - v * L);
          f(x, y);
          for (int e = 0; e < products; ++e)
            to[(e * B + b) * width + v] = y[e];
        }
      }
    });
  }

  // f(number in the window [2S - 1, 2S - 1], tap of the kernel [k, k], whether it has that one): the middle of large
  // kernels meets the map, and small ones lack the outer taps.
  template <class F>
  [[gnu::always_inline]] void for_window(const F& f) const {
    const int64_t first = k / 2 - (S - 1), corner = first * (k + 1);
    if (first >= 0) {
#pragma GCC unroll 25
      for (int n = 0; n < side * side; ++n)
        f(n, corner + n / side * k + n % side, true);
    } else {
      for (int n = 0; n < side * side; ++n) {
        const int64_t y = n / side + first, x = n % side + first;
        f(n, y * k + x, std::min(x, y) >= 0 && std::max(x, y) < k);
      }
    }
  }

  // Kernel terms [E²] of taps [k, k], `step` apart.
  void kernel_terms(const Vec<T>* taps, Vec<T>* to, int64_t step) const {
    Vec<T> t[side * side], y[products];
    for_window([&](int n, int64_t tap, bool inside) { t[n] = inside ? taps[tap] : Vec<T>{}; });
    combine_plane<false>(Axis<S>::kernel, t, y);
    for (int e = 0; e < products; ++e)
      to[e * step] = y[e];
  }

  // sums [E², B, C] of from [E², B, F] and kernels [E², F, C], a tile of C at a time: pack(first channel of the vector,
  // first of F, count, scratch, to) makes kernels, and finish(b, first channel, sums) takes [E²] sums, `step` apart.
  template <class Pack, class Finish>
  void multiply(const Vec<T>* from, int64_t F, int64_t C, const Pack& pack, const Finish& finish) const {
    const int64_t groups = (B + most_samples - 1) / most_samples, width = vectors(F);
    parallel(tiles(C) * groups, [&](int64_t begin, int64_t end) {
      const int64_t most = std::min(B, most_samples), sum_step = (most | 1) * tile;
      Buffer<T> kernels(products * kernel_step), sums(products * sum_step), scratch(depth * k * k);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c = task / groups * tile * L, b = task % groups * most, rows = std::min(most, B - b);
        for (int64_t f = 0; f < F; f += depth) {
          const int64_t count = std::min(depth, F - f);
          for (int v = 0; v < tile; ++v)
            pack(c + v * L, f, count, scratch + 0, kernels + v);
          for (int e = 0; e < products; ++e) {
            const T* a = reinterpret_cast<const T*>(from + (e * B + b) * width) + f;
            for_blocks(rows, [&](auto R, int64_t row) {
              multiply_block<T, R>({a + row * width * L, width * L, 1}, kernels + e * kernel_step, tile,
                                   sums + e * sum_step + row * tile, count, f == 0);
            });
          }
        }
        for (int64_t row = 0; row < rows; ++row)
          for (int v = 0; v < tile; ++v)
            finish(b + row, c + v * L, sums + row * tile + v, sum_step);
      }
    });
  }

  // to [B, S, S, C] at channel c of sample b.
  template <class F>
  void gather(const Vec<T>* sums, int64_t step, int64_t b, int64_t c, int64_t C, T* to, const F& f) const {
    Vec<T> x[products], y[pixels];
    for (int e = 0; e < products; ++e)
      x[e] = sums[e * step];
    f(x, y);
    for (int p = 0; p < pixels; ++p)
      store_some(to + (b * pixels + p) * C + c, y[p], C - c);
  }

  void spread_images(const T* maps, Vec<T>* to) const {
    spread(maps, nullptr, I, to, [](const Vec<T>* x, Vec<T>* y) { combine_plane<false>(Axis<S>::image, x, y); });
  }

  void forward(const T* maps, const T* bias, bool relu, T* output) const {
    Buffer<T> images(products * B * vectors(I));
    spread_images(maps, images);
    const auto pack = [&](int64_t o, int64_t i, int64_t count, Vec<T>* taps, Vec<T>* to) {  // a lane is an o
      load_lanes<T>({weight + (o * I + i) * k * k, I * k * k, weight + O * I * k * k}, used(o, O), count * k * k, taps);
      for (int64_t m = 0; m < count; ++m)
        kernel_terms(taps + m * k * k, to + m * tile, kernel_step);
    };
    multiply(images, I, O, pack, [&](int64_t b, int64_t o, const Vec<T>* sums, int64_t step) {
      gather(sums, step, b, o, O, output, [&](const Vec<T>* x, Vec<T>* y) {
        combine_plane<false>(Axis<S>::sums, x, y);
        const Vec<T> add = load_some(bias + o, O - o);
        for (int p = 0; p < pixels; ++p) {
          y[p] += add;
          if (relu) y[p] = y[p] < 0 ? Vec<T>{} : y[p];  // NaN stays
        }
      });
    });
  }

  // output: where there was a ReLU, else null
  void backward(const T* grad, const T* maps, const T* output, T* grad_maps, T* grad_weight, T* grad_bias) const {
    Buffer<T> images(products * B * vectors(I)), grads(products * B * vectors(O));
    spread_images(maps, images);
    spread(grad, output, O, grads, [](const Vec<T>* x, Vec<T>* y) { combine_plane<true>(Axis<S>::sums, x, y); });
    const auto pack = [&](int64_t i, int64_t o, int64_t count, Vec<T>* taps, Vec<T>* to) {  // a lane is an i
      for (int64_t m = 0; m < count; ++m) {
        const T* row = weight + ((o + m) * I + i) * k * k;
        if (k == 1) {
          to[m * tile] = load_some(row, I - i);
          continue;
        }
        for (int64_t n = 0; n < L * k * k; n += 64 / int(sizeof(T)))
          __builtin_prefetch(row + 4 * I * k * k + n);
        load_lanes<T>({row, k * k, weight + O * I * k * k}, used(i, I), k * k, taps);
        kernel_terms(taps, to + m * tile, kernel_step);
      }
    };
    multiply(grads, O, I, pack, [&](int64_t b, int64_t i, const Vec<T>* sums, int64_t step) {
      gather(sums, step, b, i, I, grad_maps, [&](const Vec<T>* x, Vec<T>* y) {
        combine_plane<true>(Axis<S>::image, x, y);
      });
    });
    weight_gradient(grads, images, grad_weight);
    bias_gradient(grad, output, grad_bias);
  }

  // A task owns its weights, so that the sum over samples needs no partial sums; a lane is an i.
  void weight_gradient(const Vec<T>* grads, const Vec<T>* images, T* grad_weight) const {
    constexpr int64_t outputs = 4 * most_rows, sum_step = most_rows * tile;
    const int64_t groups = (O + outputs - 1) / outputs, width = vectors(I), grads_width = vectors(O);
    parallel(tiles(I) * groups, [&](int64_t begin, int64_t end) {
      Buffer<T> sums(products * sum_step), taps(k * k);
      std::fill(taps + 0, taps + k * k, Vec<T>{});  // those outside of the plane stay 0
      for (int64_t task = begin; task < end; ++task) {
        const int64_t v0 = task / groups * tile, first = task % groups * outputs;
        for_blocks(std::min(outputs, O - first), [&](auto R, int64_t row) {
          const int64_t o = first + row;
          for (int e = 0; e < products; ++e)
            multiply_block<T, R>({reinterpret_cast<const T*>(grads + e * B * grads_width) + o, 1, grads_width * L},
                                 images + e * B * width + v0, width, sums + e * sum_step, B, true);
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < tile; ++v)
              store_taps(sums + r * tile + v, sum_step, o + r, (v0 + v) * L, taps, grad_weight);
        });
      }
    });
  }

  void store_taps(const Vec<T>* sums, int64_t sum_step, int64_t o, int64_t i, Vec<T>* taps, T* grad_weight) const {
    if (k == 1) return store_some(grad_weight + o * I + i, *sums, I - i);
    Vec<T> x[products], t[side * side];
    for (int e = 0; e < products; ++e)
      x[e] = sums[e * sum_step];
    combine_plane<true>(Axis<S>::kernel, x, t);
    for_window([&](int n, int64_t tap, bool inside) {
      if (inside) taps[tap] = t[n];
    });
    store_lanes<T>(taps, used(i, I), k * k, grad_weight + (o * I + i) * k * k, k * k);
  }

  void bias_gradient(const T* grad, const T* output, T* grad_bias) const {
    for (int64_t o = 0; o < O; o += L) {
      Vec<T> sum{};
      for (int64_t row = 0; row < B * pixels; ++row)
        sum += load_passed(grad, output, row * O + o, O - o);
      store_some(grad_bias + o, sum, O - o);
    }
  }
};

// f(SmallMapConv instance) for maps [B, side, side, I]; a kernel of 1×1 sees each pixel alone.
template <class T, class F>
void with_small_maps(const Tensor& maps, const Tensor& weight, F&& f) {
  const int64_t B = maps.size(0), side = maps.size(1), I = maps.size(3), O = weight.size(0), k = weight.size(2);
  const T* w = data<T>(weight);
  if (k == 1)
    f(SmallMapConv<T, 1>{B * side * maps.size(2), I, O, k, w});
  else if (side == 1)
    f(SmallMapConv<T, 1>{B, I, O, k, w});
  else if (side == 2)
    f(SmallMapConv<T, 2>{B, I, O, k, w});
  else
    f(SmallMapConv<T, 3>{B, I, O, k, w});
}

}  // namespace caps::cpu
