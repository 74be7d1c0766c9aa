// capsule_linear for small batches, which cannot fill the lanes with samples: votes are made once, for routing.h, and
// their gradient becomes that of inputs and weight. Builds on lanes.h.
#pragma once

#include "lanes.h"

namespace caps::cpu {

// Measured. Up to here the votes are also half as large as the weight at most, or those of one sample.
inline bool is_small_batch(const Sizes& n) { return n.B <= std::max<int64_t>(1, n.K / 2); }

// The shape that routing sees.
inline Sizes votes_sizes(Sizes n) {
  n.K = -1;
  return n;
}

// û [B, N, J, D], with the rows of W_i in the lanes: J·D fills them where B does not.
template <class T>
Tensor make_votes(const Tensor& inputs, const Tensor& weight, const Sizes& n) {
  constexpr int L = lanes<T>;
  const Tensor votes = empty(inputs, {n.B, n.N, n.J, n.D});
  const T *u = data<T>(inputs), *w = data<T>(weight), *w_end = w + weight.numel();
  T* to = data<T>(votes);
  const int64_t JD = n.J * n.D, K = n.K;
  parallel(n.N, [&](int64_t begin, int64_t end) {
    Buffer<T> columns(K);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t row = 0; row < JD; row += L) {
        const int used = std::min<int64_t>(L, JD - row);
        // Reading W is most of the work: fetch it four blocks ahead. Beyond the end of W a prefetch does nothing.
        const T* w_row = w + (i * JD + row) * K;
        for (int64_t ahead = 0; ahead < L * K; ahead += 64 / sizeof(T))
          __builtin_prefetch(w_row + 4 * L * K + ahead);
        load_lanes<T>({w_row, K, w_end}, used, K, columns);
        for (int64_t b = 0; b < n.B; ++b) {
          const T* ub = u + (b * n.N + i) * K;
          Vec<T> x{};
          for (int64_t k = 0; k < K; ++k)
            x += ub[k] * columns[k];
          std::memcpy(to + (b * n.N + i) * JD + row, &x, used * sizeof(T));
        }
      }
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
