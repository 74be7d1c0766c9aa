// capsule_linear for small batches, which cannot fill the lanes with samples: votes are made once, for routing.h, and
// their gradient becomes that of inputs and weight. Builds on lanes.h.
#pragma once

#include "lanes.h"

namespace caps::cpu {

// Whether the rows of W_i fill whole vectors: one or, with the models' K, perhaps two to a vector.
template <class T>
bool fills_vectors(const Sizes& n) {
  return n.J * n.D % lanes<T> == 0 && (n.K == lanes<T> || (n.K == 8 && n.K < lanes<T>));
}

// Measured. Up to here the votes are also no larger than 3 / 4 of the weight, or those of one sample.
template <class T>
bool is_small_batch(const Sizes& n) {
  return n.B <= std::max<int64_t>(1, fills_vectors<T>(n) ? 3 * n.K / 4 : n.K / 2);
}

// The shape that routing sees.
inline Sizes votes_sizes(Sizes n) {
  n.K = -1;
  return n;
}

// û of one W_i, whose rows are in the lanes: J·D fills them where B does not.
template <class T>
void make_votes_of(const T* w, const T* w_end, const T* u, const Sizes& n, Vec<T>* columns, T* to) {
  constexpr int L = lanes<T>;
  const int64_t JD = n.J * n.D, K = n.K;
  for (int64_t row = 0; row < JD; row += L) {
    const int used = std::min<int64_t>(L, JD - row);
    load_lanes<T>({w + row * K, K, w_end}, used, K, columns);
    for (int64_t b = 0; b < n.B; ++b) {
      Vec<T> x{};
      for (int64_t k = 0; k < K; ++k)
        x += u[b * n.N * K + k] * columns[k];
      std::memcpy(to + b * n.N * JD + row, &x, used * sizeof(T));
    }
  }
}

// The same for rows that fit into a vector, with whole vectors of W_i times u, which is repeated in its vector.
template <class T, int K>
void make_votes_of(const T* w, const T* u, const Sizes& n, T* to) {
  constexpr int L = lanes<T>;
  const int64_t JD = n.J * n.D;
  for (int64_t b = 0; b < n.B; ++b) {
    Vec<T> u_b;
    for (int l = 0; l < L; l += K)
      std::memcpy(reinterpret_cast<T*>(&u_b) + l, u + b * n.N * K, K * sizeof(T));
    for (int64_t row = 0; row < JD; row += L) {
      Vec<T> x[K];
#pragma GCC unroll 16
      for (int m = 0; m < K; ++m)
        x[m] = load(w + row * K + m * L) * u_b;
      store(to + b * n.N * JD + row, segment_sums<T, K>(x));
    }
  }
}

// û [B, N, J, D]
template <class T>
Tensor make_votes(const Tensor& inputs, const Tensor& weight, const Sizes& n) {
  constexpr int L = lanes<T>;
  const Tensor votes = empty(inputs, {n.B, n.N, n.J, n.D});
  const int64_t JD = n.J * n.D, K = n.K;
  const T *w = data<T>(weight), *w_end = w + weight.numel();
  parallel(n.N, [&](int64_t begin, int64_t end) {
    Buffer<T> columns(K);
    for (int64_t i = begin; i < end; ++i) {
      const T *w_i = w + i * JD * K, *u = data<T>(inputs) + i * K;
      T* const to = data<T>(votes) + i * JD;
      if (!fills_vectors<T>(n))
        make_votes_of(w_i, w_end, u, n, columns, to);
      else if (K == L)
        make_votes_of<T, L>(w_i, u, n, to);
      else
        make_votes_of<T, std::min(L, 8)>(w_i, u, n, to);
    }
  });
  return votes;
}

// Of columns k .. of one W_i and one sample: gu = Wᵀ gû, and gW += gû uᵀ, or = where it is the first sample.
template <class T, class Columns>
void linear_gradient_columns(const T* g_votes, const T* u, const T* w, int64_t rows, int64_t K, bool first, T* gu,
                             T* gw) {
  Columns u_k, sum{};
  std::memcpy(&u_k, u, sizeof u_k);
  for (int64_t row = 0; row < rows; ++row) {
    Columns w_k, gw_k{};
    std::memcpy(&w_k, w + row * K, sizeof w_k);
    if (!first) std::memcpy(&gw_k, gw + row * K, sizeof gw_k);
    sum += w_k * g_votes[row];
    gw_k += u_k * g_votes[row];
    std::memcpy(gw + row * K, &gw_k, sizeof gw_k);
  }
  std::memcpy(gu, &sum, sizeof sum);
}

template <class T>
void linear_gradients(const T* g_votes, const T* u, const T* w, const Sizes& n, T* gu, T* gw) {
  typedef T Eight __attribute__((vector_size(8 * sizeof(T))));  // the models' K
  const int64_t JD = n.J * n.D, K = n.K;
  parallel(n.N, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t b = 0; b < n.B; ++b) {
        const int64_t at = b * n.N + i;
        const auto columns = [&](auto size, int64_t k) {
          linear_gradient_columns<T, decltype(size)>(g_votes + at * JD, u + at * K + k, w + i * JD * K + k, JD, K,
                                                     b == 0, gu + at * K + k, gw + i * JD * K + k);
        };
        int64_t k = 0;
        for (; k + 8 <= K; k += 8)
          columns(Eight(), k);
        for (; k < K; ++k)
          columns(T(), k);
      }
    }
  });
  if (n.B == 0) std::fill(gw, gw + n.N * JD * K, T(0));
}

}  // namespace caps::cpu
