// squash of capsules, and its gradient: of one capsule per lane, of one in plain numbers, and of whole rows where no
// component is extreme. The equations are those of caps.h; builds on lanes.h.
#pragma once

#include "lanes.h"

#include <cmath>

namespace caps::cpu {

// ---- one capsule in X: a vector, with a capsule in each lane, or a plain number -------------------------------------

template <class T>
inline T square_root(T x) {
  return std::sqrt(x);
}
template <class T>
inline T square_root_lanes(T x) {
  for (size_t l = 0; l < sizeof(x) / sizeof(x[0]); ++l)
    x[l] = std::sqrt(x[l]);
  return x;
}

// The capsule s [D], scaled so that its square neither overflows nor vanishes.
template <class T, class X>
struct Norm {
  X scale, square, length;  // Σ (scale s)² and |s|

  Norm(const X* s, int D) {
    X largest{};
    square = X{};
    for (int d = 0; d < D; ++d) {
      const X size = s[d] < 0 ? -s[d] : s[d];
      largest = size > largest ? size : largest;
    }
    scale = norm_scale<X, T>(largest);
    for (int d = 0; d < D; ++d)
      square += (scale * s[d]) * (scale * s[d]);
    if constexpr (std::is_same_v<X, T>)
      length = square_root(square) / scale;
    else
      length = square_root_lanes(square) / scale;
  }
};

// v = squash(s)
template <class T, class X>
inline void squash_capsule(const X* s, X* v, int D) {
  const X factor = squash_factor(Norm<T, X>(s, D).length);
  for (int d = 0; d < D; ++d)
    v[d] = factor * s[d];
}

// gs = f (g + q e (e·g)) with e = s / |s|
template <class T, class X>
inline void squash_capsule_backward(const X* s, const X* g, X* gs, int D) {
  const Norm<T, X> norm(s, D);
  X along{};
  for (int d = 0; d < D; ++d)
    along += (norm.scale * s[d]) * g[d];
  const X factor = squash_factor(norm.length);
  const X divisor = norm.square == 0 ? X{} + T(1) : norm.square;  // s = 0: f = 0, and 0 / 0 would make it NaN
  const X share = squash_slope(norm.length) * along / divisor;
  for (int d = 0; d < D; ++d)
    gs[d] = factor * (g[d] + share * (norm.scale * s[d]));
}

// ---- capsules in memory, [.., D] ------------------------------------------------------------------------------------

// f(first number, rows) for each lane-full of capsules [D] in [.., D].
template <class T, class F>
void for_capsules(const Tensor& s, const F& f) {
  constexpr int L = lanes<T>;
  const int64_t D = s.size(s.dim() - 1), rows = D ? s.numel() / D : 0, groups = (rows + L - 1) / L;
  // A thread's share is about 2,048 vectors at least; + 1 because D can be 0.
  torch::stable::parallel_for(0, groups, 2048 / (D + 1) + 1, [&](int64_t begin, int64_t end) {
    Buffer<T> x(D), g(D);
    for (int64_t group = begin; group < end; ++group)
      f(group * L * D, std::min<int64_t>(L, rows - group * L), x, g);
  });
}

// v = squash(s) for a full set of lanes where no square leaves the range of T; there the sums of squares alone change
// places, and s is not transposed. Otherwise false.
template <class T, int FixedD>
bool squash_rows(const T* s, int64_t D_, T* v) {
  constexpr int L = lanes<T>;
  const int64_t D = FixedD > 0 ? FixedD : D_;
  Vec<T> x[L];
  for (int r = 0; r < L; ++r) {
    const T* row = s + r * D;
    Vec<T> tail{};
    std::memcpy(&tail, row + D / L * L, D % L * sizeof(T));
    x[r] = tail * tail;
    for (int64_t d = 0; d + L <= D; d += L)
      x[r] += load(row + d) * load(row + d);
  }
  const Vec<T> square = row_sums<T>(x);
  constexpr T limit = NormRange<T>::limit * NormRange<T>::limit;
  int inside = 0;
  for (int l = 0; l < L; ++l)
    inside += square[l] < limit && square[l] > 1 / limit;
  if (inside < L) return false;
  T factor[L];
  store(factor, squash_factor(square_root_lanes(square)));
  for (int r = 0; r < L; ++r) {
    const T f = factor[r];
    for (int64_t d = 0; d < D; ++d)
      v[r * D + d] = f * s[r * D + d];
  }
  return true;
}

}  // namespace caps::cpu
