// Passes over a block of input capsules, for all lanes at once: the votes' sum, their coupled sum, and their gradients.
// routing.h and linear.h call them with votes û that are stored, or made as W u; builds on softmax.h.
#pragma once

#include "softmax.h"

#include <utility>

namespace caps::cpu {

// ---- a block, and where its votes come from -------------------------------------------------------------------------

// A block is M vectors of votes û [M, J, D]. Where they come from is the source's affair: its add() adds the votes of
// rows (j, d) to a block of registers. FixedD = 0 stands for any D, taken in smaller blocks.
// M capsules at a time, because a sum [J, D] then passes through the registers once for all of them, not for each.
struct Block {
  int M, J, D, T;
};

// f(number of rows as a type, first row): an array of that many vectors then lies in registers.
template <int FixedD, class F>
inline void for_rows(int D, F&& f) {
  if constexpr (FixedD > 0) {
    f(Const<FixedD>(), 0);
  } else {
    int d = 0;
    for (; d + 8 <= D; d += 8)
      f(Const<8>(), d);
    for (; d + 4 <= D; d += 4)
      f(Const<4>(), d);
    for (; d < D; ++d)
      f(Const<1>(), d);
  }
}

// Row by row and not in a loop, which g++ would turn into a call of memcpy, away from the registers.
template <int R, class V, size_t... r>
inline void copy_rows(const V* from, V* to, std::index_sequence<r...>) {
  ((to[r] = from[r]), ...);
}
template <int R, class V>
inline void copy_rows(const V* from, V* to) {
  copy_rows<R>(from, to, std::make_index_sequence<R>());
}

// Σ_r x[r] y[r], by four sums that do not wait for each other.
template <int R, class V>
inline V dot(const V (&x)[R], const V* y) {
  V sums[4] = {};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    sums[r % 4] += x[r] * y[r];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// û_m = W_m u_m; W [M, J·D, K] numbers, u [M, K] vectors.
template <class T, int FixedK>
struct LinearVotes {
  static constexpr bool stored = false;
  const T* weight;
  const Vec<T>* inputs;
  int rows, size;

  int K() const { return FixedK > 0 ? FixedK : size; }

  template <int R>
  inline void add(int m, int row, Vec<T> (&x)[R]) const {
    const T* w = weight + (int64_t(m) * rows + row) * K();
    const Vec<T>* u = inputs + m * K();
    for (int k = 0; k < K(); ++k) {
      const Vec<T> uk = u[k];
      for (int r = 0; r < R; ++r)
        x[r] += w[r * K() + k] * uk;
    }
  }
};

// û [M, J·D] vectors that are there already.
template <class T>
struct StoredVotes {
  static constexpr bool stored = true;
  const Vec<T>* votes;
  int rows;

  template <int R>
  inline void add(int m, int row, Vec<T> (&x)[R]) const {
    for (int r = 0; r < R; ++r)
      x[r] += votes[m * rows + row + r];
  }
};

// ---- the passes -----------------------------------------------------------------------------------------------------

// sum [J, D] += Σ_m û_m: the first iteration but for the factor 1 / J.
template <class T, int FixedD, class Source>
inline void add_votes(const Source& source, Block n, Vec<T>* sum) {
  for (int j = 0; j < n.J; ++j) {
    for_rows<FixedD>(n.D, [&](auto R, int d) {
      Vec<T> x[R];
      Vec<T>* s = sum + j * n.D + d;
      copy_rows<R>(s, x);
      for (int m = 0; m < n.M; ++m)
        source.add(m, j * n.D + d, x);
      copy_rows<R>(x, s);
    });
  }
}

// sum [J, D] += Σ_m c_m û_m with c = softmax(û·V), or with h in the place of c where gs is given. votes, b and p are
// scratch of [M, J, D], [M, J] and [M, J]; votes that are stored are passed as votes too.
// Votes W u are made once, for the logits, and kept for the sum, which has to wait for the softmax over all J.
template <class T, int FixedD, class Source>
inline void add_coupled_votes(const Source& source, Block n, const Vec<T>* V, const Vec<T>* gs, Vec<T>* sum,
                              Vec<T>* votes, Vec<T>* b, Vec<T>* p) {
  const int rows = n.J * n.D;
  for (int j = 0; j < n.J; ++j) {
    for (int m = 0; m < n.M; ++m) {
      Vec<T> logit{}, slope{};
      for_rows<FixedD>(n.D, [&](auto R, int d) {
        const int row = j * n.D + d;
        Vec<T> x[R] = {};
        source.add(m, row, x);
        if constexpr (!Source::stored) copy_rows<R>(x, votes + m * rows + row);
        logit += dot<R>(x, V + row);
        if (gs) slope += dot<R>(x, gs + row);
      });
      b[m * n.J + j] = logit;
      p[m * n.J + j] = slope;
    }
  }
  for (int m = 0; m < n.M; ++m) {
    softmax<T>(b + m * n.J, n.J);
    if (gs) softmax_backward<T>(b + m * n.J, p + m * n.J, n.J);
  }
  const Vec<T>* share = gs ? p : b;
  for (int j = 0; j < n.J; ++j) {
    for_rows<FixedD>(n.D, [&](auto R, int d) {
      const int row = j * n.D + d;
      Vec<T> x[R];
      copy_rows<R>(sum + row, x);
      for (int m = 0; m < n.M; ++m) {
        const Vec<T> c = share[m * n.J + j];
        for (int r = 0; r < R; ++r)
          x[r] += c * votes[m * rows + row + r];
      }
      copy_rows<R>(x, sum + row);
    });
  }
}

// grad [M, J, D] = gs¹ / J + Σ_{t=2..T} (c^t gs^t + h^t V^{t-1}), the gradient of the votes. V [T-1] and gs [T] lie
// `step` apart; b and p are scratch of [T-1, M, J].
template <class T, int FixedD, class Source>
inline void vote_gradients(const Source& source, Block n, const Vec<T>* V, const Vec<T>* gs, int64_t step,
                           Vec<T>* grad, Vec<T>* b, Vec<T>* p) {
  const int rows = n.J * n.D, MJ = n.M * n.J;
  for (int j = 0; j < n.J; ++j) {
    for (int m = 0; m < n.M; ++m) {
      const int at = m * n.J + j;
      for (int t = 0; t < n.T - 1; ++t)
        b[t * MJ + at] = p[t * MJ + at] = Vec<T>{};
      for_rows<FixedD>(n.D, [&](auto R, int d) {
        const int row = j * n.D + d;
        Vec<T> x[R] = {};
        source.add(m, row, x);
        for (int t = 0; t < n.T - 1; ++t) {
          b[t * MJ + at] += dot<R>(x, V + t * step + row);
          p[t * MJ + at] += dot<R>(x, gs + (t + 1) * step + row);
        }
      });
    }
  }
  for (int i = 0; i < (n.T - 1) * n.M; ++i) {
    softmax<T>(b + i * n.J, n.J);
    softmax_backward<T>(b + i * n.J, p + i * n.J, n.J);
  }
  for (int j = 0; j < n.J; ++j) {
    for (int m = 0; m < n.M; ++m) {
      for_rows<FixedD>(n.D, [&](auto R, int d) {
        const int row = j * n.D + d;
        Vec<T> x[R];
        for (int r = 0; r < R; ++r)
          x[r] = gs[row + r] * (T(1) / n.J);
        for (int t = 0; t < n.T - 1; ++t) {
          const Vec<T> c = b[t * MJ + m * n.J + j], h = p[t * MJ + m * n.J + j];
          for (int r = 0; r < R; ++r)
            x[r] += c * gs[(t + 1) * step + row + r] + h * V[t * step + row + r];
        }
        copy_rows<R>(x, grad + m * rows + row);
      });
    }
  }
}

}  // namespace caps::cpu
