// capsule_linear: a lane is a sample. All samples of a lane group share each number of W_i, and votes live in registers
// and L1. Builds on passes.h and squash.h.
#pragma once

#include "passes.h"
#include "squash.h"

namespace caps::cpu {

// ---- how the work is cut --------------------------------------------------------------------------------------------

// How the work is cut; by the sizes alone, never by the number of threads.
template <class T>
struct Plan {
  int64_t G, JD, block, chunk, C;  // lane groups, J·D, input capsules in a block and in a chunk, chunks

  explicit Plan(const Sizes& n) : G((n.B + lanes<T> - 1) / lanes<T>), JD(n.J * n.D) {
    const int64_t votes_bytes = std::max<int64_t>(1, JD * vector_bytes);
    const int64_t weight_bytes = std::max<int64_t>(1, JD * n.K * sizeof(T));
    block = std::clamp<int64_t>(24'000 / votes_bytes, 1, 8);                      // the block's votes stay in L1
    const int64_t cached = std::max<int64_t>(8, 256'000 / weight_bytes);          // a chunk's weights stay in L2
    const int64_t shared = n.N * G / 64;                                          // tasks enough for 64 threads
    const int64_t small = G * lanes<T> / std::max<int64_t>(1, n.K);               // partial sums no larger than W:
                                                                                  // C·G·lanes <= N·K
    chunk = std::max({std::min(cached, shared), small, block});
    chunk = (chunk + block - 1) / block * block;
    C = (n.N + chunk - 1) / chunk;
  }
};

template <class T>
int lanes_used(int64_t g, int64_t B) {
  return std::min<int64_t>(lanes<T>, B - g * lanes<T>);
}

// ---- the passes over N ----------------------------------------------------------------------------------------------

template <class T, int FixedK, int FixedD>
struct Linear {
  using Votes = LinearVotes<T, FixedK>;
  static constexpr int L = lanes<T>;
  const Sizes n;
  const T* inputs;
  const T* weight;
  const Plan<T> plan{n};

  Block block(int64_t M) const { return {int(M), int(n.J), int(n.D), int(n.T)}; }

  // The votes of input capsules i.. of lane group g; u is scratch for their inputs.
  Votes votes(int64_t g, int64_t i, int64_t M, Vec<T>* u) const {
    const Rows<T> rows{inputs + (g * L * n.N + i) * n.K, n.N * n.K, inputs + n.B * n.N * n.K};
    load_lanes(rows, lanes_used<T>(g, n.B), M * n.K, u);
    return {weight + i * plan.JD * n.K, u, int(plan.JD), int(n.K)};
  }

  // One pass over all input capsules, into partial sums [C, G, J, D]. Without V: the first iteration.
  void pass(const Vec<T>* V, const Vec<T>* gs, Vec<T>* partial) const {
    const int64_t JD = plan.JD;
    parallel(plan.C * plan.G, [&](int64_t begin, int64_t end) {
      Buffer<T> u(plan.block * n.K + 1), votes_(plan.block * JD + 1), b(plan.block * n.J), p(plan.block * n.J);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t g = task % plan.G, first = task / plan.G * plan.chunk, last = std::min(first + plan.chunk, n.N);
        Vec<T>* sum = partial + task * JD;
        std::fill(sum, sum + JD, Vec<T>{});
        for (int64_t i = first; i < last; i += plan.block) {
          const int64_t M = std::min(plan.block, last - i);
          const Votes source = votes(g, i, M, u);
          if (V)
            add_coupled_votes<T, FixedD>(source, block(M), V + g * JD, gs ? gs + g * JD : nullptr, sum, votes_, b, p);
          else
            add_votes<T, FixedD>(source, block(M), sum);
        }
      }
    });
  }

  void add_partial(const Vec<T>* partial, int64_t g, Vec<T>* sum) const {
    for (int64_t c = 0; c < plan.C; ++c)
      for (int64_t row = 0; row < plan.JD; ++row)
        sum[row] += partial[(c * plan.G + g) * plan.JD + row];
  }

  void forward(T* output, T* sums) const {
    const int64_t JD = plan.JD;
    Buffer<T> partial(plan.C * plan.G * JD), V(plan.G * JD);
    std::fill(V + 0, V + plan.G * JD, Vec<T>{});
    for (int64_t t = 0; t < n.T; ++t) {
      pass(t ? V + 0 : nullptr, nullptr, partial);
      parallel(plan.G, [&](int64_t begin, int64_t end) {
        Buffer<T> s(JD), v(JD);
        for (int64_t g = begin; g < end; ++g) {
          std::fill(s + 0, s + JD, Vec<T>{});
          add_partial(partial, g, s);
          for (int64_t row = 0; t == 0 && row < JD; ++row)
            s[row] *= T(1) / n.J;
          for (int64_t j = 0; j < n.J; ++j)
            squash_capsule<T>(s + j * n.D, v + j * n.D, n.D);
          for (int64_t row = 0; row < JD; ++row)
            V[g * JD + row] += v[row];
          const int used = lanes_used<T>(g, n.B);
          store_lanes<T>(s, used, JD, sums + (t * n.B + g * L) * JD, JD);
          if (t == n.T - 1) store_lanes<T>(v, used, JD, output + g * L * JD, JD);
        }
      });
    }
  }

  void load_capsules(const T* from, int64_t g, Vec<T>* to) const {  // of [B, J, D]
    load_lanes<T>({from + g * L * plan.JD, plan.JD, from + n.B * plan.JD}, lanes_used<T>(g, n.B), plan.JD, to);
  }

  void backward(const T* grad, const T* sums, T* grad_inputs, T* grad_weight) const {
    const int64_t JD = plan.JD, step = plan.G * JD;
    Buffer<T> partial(plan.C * step), V((n.T - 1) * step), gs(n.T * step), flow(step);
    parallel(plan.G, [&](int64_t begin, int64_t end) {
      Buffer<T> s(JD), g_out(JD);
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t t = 0; t < n.T - 1; ++t) {  // V^t = V^{t-1} + v^t
          Vec<T>* now = V + t * step + g * JD;
          load_capsules(sums + t * n.B * JD, g, s);
          for (int64_t j = 0; j < n.J; ++j)
            squash_capsule<T>(s + j * n.D, now + j * n.D, n.D);
          for (int64_t row = 0; t > 0 && row < JD; ++row)
            now[row] += now[row - step];
        }
        load_capsules(sums + (n.T - 1) * n.B * JD, g, s);
        load_capsules(grad, g, g_out);
        for (int64_t j = 0; j < n.J; ++j)
          squash_capsule_backward<T>(s + j * n.D, g_out + j * n.D, gs + (n.T - 1) * step + g * JD + j * n.D, n.D);
        std::fill(flow + g * JD, flow + (g + 1) * JD, Vec<T>{});
      }
    });
    for (int64_t t = n.T - 1; t > 0; --t) {  // flow = Σ gV, which reaches every earlier v
      pass(V + (t - 1) * step, gs + t * step, partial);
      parallel(plan.G, [&](int64_t begin, int64_t end) {
        Buffer<T> s(JD);
        for (int64_t g = begin; g < end; ++g) {
          add_partial(partial, g, flow + g * JD);
          load_capsules(sums + (t - 1) * n.B * JD, g, s);
          for (int64_t j = 0; j < n.J; ++j)
            squash_capsule_backward<T>(s + j * n.D, flow + g * JD + j * n.D,
                                       gs + (t - 1) * step + g * JD + j * n.D, n.D);
        }
      });
    }
    gradients(V, gs, step, grad_inputs, grad_weight);
  }

  // The final pass. A task owns its input capsules, so that the sum over samples needs no partial sums.
  void gradients(const Vec<T>* V, const Vec<T>* gs, int64_t step, T* grad_inputs, T* grad_weight) const {
    const int64_t JD = plan.JD, size = plan.block * std::max<int64_t>(1, plan.chunk * plan.G / plan.block / 8);
    const int64_t chunk = std::min(size, plan.chunk);
    parallel((n.N + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
      const int64_t scratch = (n.T - 1) * plan.block * n.J;
      // g_votes: weight_gradient_units<2> reads a vector beyond an odd J·D.
      Buffer<T> u(plan.block * n.K + 1), gu(plan.block * n.K + 1), g_votes(plan.block * JD + 2), b(scratch), p(scratch);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * chunk, last = std::min(first + chunk, n.N);
        for (int64_t g = 0; g < plan.G; ++g) {
          for (int64_t i = first; i < last; i += plan.block) {
            const int64_t M = std::min(plan.block, last - i);
            const Votes source = votes(g, i, M, u);
            vote_gradients<T, FixedD>(source, block(M), V + g * JD, gs + g * JD, step, g_votes, b, p);
            for (int64_t m = 0; m < M; ++m) {
              input_gradient(g_votes + m * JD, weight + (i + m) * JD * n.K, gu + m * n.K);
              weight_gradient(g_votes + m * JD, u + m * n.K, grad_weight + (i + m) * JD * n.K, g == 0);
            }
            store_lanes<T>(gu, lanes_used<T>(g, n.B), M * n.K, grad_inputs + (g * L * n.N + i) * n.K, n.N * n.K);
          }
        }
      }
    });
    if (plan.G == 0) std::fill(grad_weight, grad_weight + n.N * JD * n.K, T(0));
  }

  // gu [K] = Wᵀ gû
  void input_gradient(const Vec<T>* g_votes, const T* w, Vec<T>* gu) const {
    const int K = FixedK > 0 ? FixedK : n.K;
    for_rows<FixedK>(K, [&](auto R, int k) {
      Vec<T> x[R] = {};
      for (int64_t row = 0; row < plan.JD; ++row) {
        const Vec<T> g = g_votes[row];
        for (int r = 0; r < R; ++r)
          x[r] += w[row * K + k + r] * g;
      }
      for (int r = 0; r < R; ++r)
        gu[k + r] = x[r];
    });
  }

  // gW [J·D, K] (+)= Σ over lanes of gû uᵀ. Lanes change their meaning here: a vector holds units of P samples for
  // L / P columns of W, against which P numbers of gû are spread; so neither gû nor gW needs a transpose.
  void weight_gradient(const Vec<T>* g_votes, const Vec<T>* u, T* gw, bool first) const {
    // The models' K = 8 would fill half of 16 lanes: two samples side by side need half as many multiplications.
    if constexpr (2 * sizeof(T) == sizeof(int64_t) && L == 16) {
      if (n.K <= L / 2) return weight_gradient_units<2>(g_votes, u, gw, first);
    }
    weight_gradient_units<1>(g_votes, u, gw, first);
  }

  template <int P>
  void weight_gradient_units(const Vec<T>* g_votes, const Vec<T>* u, T* gw, bool first) const {
    constexpr int columns = L / P;
    const int K = FixedK > 0 ? FixedK : n.K;
    for (int k = 0; k < K; k += columns) {
      const int width = std::min(columns, K - k);
      Vec<T> y[columns];
      for (int c = 0; c < columns; ++c)
        y[c] = c < width ? u[k + c] : Vec<T>{};
      transpose<T, P>(y);
      for (int64_t row = 0; row < plan.JD; row += P) {
        Vec<T> x[P] = {};
        for (int r = 0; r < P; ++r)
          for (int c = 0; c < columns; ++c)
            x[r] += spread<P>(g_votes + row + r, c) * y[c];
        add_rows<P>(segment_sums<T, P>(x), gw + row * K + k, std::min<int64_t>(P, plan.JD - row), K, width, first);
      }
    }
  }

  // Numbers c·P .. of `from`, repeated over the lanes.
  template <int P>
  static Vec<T> spread(const Vec<T>* from, int c) {
    if constexpr (P == 1) {
      return Vec<T>{} + reinterpret_cast<const T*>(from)[c];
    } else {
      static_assert(P * sizeof(T) == sizeof(int64_t));  // two floats are repeated as one integer of 8 bytes
      typedef int64_t Pairs __attribute__((vector_size(vector_bytes)));
      int64_t pair;
      std::memcpy(&pair, reinterpret_cast<const char*>(from) + c * sizeof pair, sizeof pair);
      return (Vec<T>)(Pairs{} + pair);
    }
  }

  template <int P>
  static void add_rows(Vec<T> x, T* to, int rows, int64_t stride, int width, bool first) {
    if (rows == P && width == L / P && (P == 1 || stride == width)) {  // rows without a gap: one store
      store(to, first ? x : x + load(to));
      return;
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < width; ++c)
        to[r * stride + c] = (first ? T(0) : to[r * stride + c]) + x[r * (L / P) + c];
  }
};

// f(Linear instance): the models' capsules, 8 -> 16 dimensions, have their own.
template <class T, class F>
void with_linear(const Tensor& inputs, const Tensor& weight, const Sizes& n, F&& f) {
  if (n.K == 8 && n.D == 16)
    f(Linear<T, 8, 16>{n, data<T>(inputs), data<T>(weight)});
  else
    f(Linear<T, 0, 0>{n, data<T>(inputs), data<T>(weight)});
}

}  // namespace caps::cpu
