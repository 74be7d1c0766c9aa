// routing: a lane is an input capsule of one sample, and votes are transposed as they are read. Builds on passes.h and
// squash.h.
#pragma once

#include "passes.h"
#include "squash.h"

namespace caps::cpu {

// The only horizontal step: lanes are input capsules, and s is a sum over them, but it comes once a chunk.
// total [rows] += sum over the lanes of x [rows]
template <class T>
void add_lanes(const Vec<T>* x, int64_t rows, T* total) {
  constexpr int L = lanes<T>;
  for (int64_t row = 0; row < rows; row += L) {
    Vec<T> y[L];
    for (int r = 0; r < L; ++r)
      y[r] = row + r < rows ? x[row + r] : Vec<T>{};
    const Vec<T> sum = row_sums<T>(y);
    for (int r = 0; r < L && row + r < rows; ++r)
      total[row + r] += sum[r];
  }
}

template <class T>
struct Routing {
  static constexpr int L = lanes<T>;
  const Sizes n;
  const T* votes;  // [B, N, J, D]
  const int64_t JD = n.J * n.D;
  const int64_t block = L * std::clamp<int64_t>(24'000 / std::max<int64_t>(1, JD * vector_bytes), 1, 8);
  const int64_t chunk = (128 + block - 1) / block * block, C = (n.N + chunk - 1) / chunk;

  Rows<T> rows(int64_t b, int64_t i) const { return {votes + (b * n.N + i) * JD, JD, votes + n.B * n.N * JD}; }

  // û of input capsules i .. last - 1, at most a block of them.
  Block load_votes(int64_t b, int64_t i, int64_t last, Vec<T>* to) const {
    int M = 0;
    for (; M * L < block && i + M * L < last; ++M)
      load_lanes(rows(b, i + M * L), std::min<int64_t>(L, last - i - M * L), JD, to + M * JD);
    return {M, int(n.J), int(n.D), int(n.T)};
  }

  // f(sample) for all samples: one thread each, or one after the other with all threads on its chunks. The
  // number of threads decides which, and the result is the same: so are the chunks and their order in the sum.
  template <class F>
  void for_samples(const F& f) const {
    if (n.B < torch::stable::get_num_threads()) {
      for (int64_t b = 0; b < n.B; ++b)
        f(b, [](int64_t count, auto&& g) { parallel(count, g); });
    } else {
      parallel(n.B, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          f(b, [](int64_t count, auto&& g) { g(int64_t(0), count); });
      });
    }
  }

  static void splat(const T* from, int64_t count, Vec<T>* to) {
    for (int64_t i = 0; i < count; ++i)
      to[i] = Vec<T>{} + from[i];
  }

  // total [J, D] += the sum over the input capsules of sample b, like Linear::pass.
  template <class Over>
  void pass(int64_t b, const Over& over, const T* V, const T* gs, T* partial, T* total) const {
    over(C, [&](int64_t begin, int64_t end) {
      Buffer<T> V_(JD), gs_(JD), sum(JD), votes_(block / L * JD), logits(block / L * n.J), slopes(block / L * n.J);
      if (V) splat(V, JD, V_);
      if (gs) splat(gs, JD, gs_);
      for (int64_t c = begin; c < end; ++c) {
        std::fill(sum + 0, sum + JD, Vec<T>{});
        const int64_t last = std::min((c + 1) * chunk, n.N);
        for (int64_t i = c * chunk; i < last; i += block) {
          const Block size = load_votes(b, i, last, votes_);
          const StoredVotes<T> source{votes_, int(JD)};
          if (V)
            add_coupled_votes<T, 0>(source, size, V_, gs ? gs_ + 0 : nullptr, sum, votes_, logits, slopes);
          else
            add_votes<T, 0>(source, size, sum);
        }
        std::fill(partial + c * JD, partial + (c + 1) * JD, T(0));
        add_lanes<T>(sum, JD, partial + c * JD);
      }
    });
    for (int64_t c = 0; c < C; ++c)
      for (int64_t row = 0; row < JD; ++row)
        total[row] += partial[c * JD + row];
  }

  // Numbers, not vectors, in a buffer of vectors.
  static T* numbers(const Buffer<T>& buffer) { return reinterpret_cast<T*>(buffer + 0); }
  static int64_t vectors(int64_t count) { return count / L + 1; }

  void forward(T* output, T* sums) const {
    for_samples([&](int64_t b, auto&& over) {
      Buffer<T> partial(vectors(C * JD)), V_(vectors(JD));
      T *V = numbers(V_), *v = output + b * JD;
      std::fill(V, V + JD, T(0));
      for (int64_t t = 0; t < n.T; ++t) {
        T* s = sums + (t * n.B + b) * JD;
        std::fill(s, s + JD, T(0));
        pass(b, over, t ? V : nullptr, nullptr, numbers(partial), s);
        for (int64_t row = 0; t == 0 && row < JD; ++row)
          s[row] *= T(1) / n.J;
        for (int64_t j = 0; j < n.J; ++j)
          squash_capsule<T>(s + j * n.D, v + j * n.D, n.D);
        for (int64_t row = 0; row < JD; ++row)
          V[row] += v[row];
      }
    });
  }

  void backward(const T* grad, const T* sums, T* grad_votes) const {
    for_samples([&](int64_t b, auto&& over) {
      Buffer<T> partial(vectors(C * JD)), V_(vectors(n.T * JD)), gs_(vectors(n.T * JD)), flow_(vectors(JD));
      T *V = numbers(V_), *gs = numbers(gs_), *flow = numbers(flow_);
      const auto sum = [&](int64_t t) { return sums + (t * n.B + b) * JD; };
      for (int64_t t = 0; t < n.T - 1; ++t) {
        for (int64_t j = 0; j < n.J; ++j)
          squash_capsule<T>(sum(t) + j * n.D, V + t * JD + j * n.D, n.D);
        for (int64_t row = 0; t > 0 && row < JD; ++row)
          V[t * JD + row] += V[(t - 1) * JD + row];
      }
      std::fill(flow, flow + JD, T(0));
      for (int64_t t = n.T - 1; t >= 0; --t) {
        if (t < n.T - 1) pass(b, over, V + t * JD, gs + (t + 1) * JD, numbers(partial), flow);
        const T* g = t < n.T - 1 ? flow : grad + b * JD;
        for (int64_t j = 0; j < n.J; ++j)
          squash_capsule_backward<T>(sum(t) + j * n.D, g + j * n.D, gs + t * JD + j * n.D, n.D);
      }
      gradients(b, over, V, gs, grad_votes);
    });
  }

  template <class Over>
  void gradients(int64_t b, const Over& over, const T* V, const T* gs, T* grad_votes) const {
    over(C, [&](int64_t begin, int64_t end) {
      const int64_t M = block / L, scratch = (n.T - 1) * M * n.J;
      Buffer<T> V_((n.T - 1) * JD), gs_(n.T * JD), votes_(M * JD), g_votes(M * JD), logits(scratch), slopes(scratch);
      splat(V, (n.T - 1) * JD, V_);
      splat(gs, n.T * JD, gs_);
      const int64_t last = std::min(end * chunk, n.N);
      for (int64_t i = begin * chunk; i < last; i += block) {
        const Block size = load_votes(b, i, last, votes_);
        vote_gradients<T, 0>(StoredVotes<T>{votes_, int(JD)}, size, V_, gs_, JD, g_votes, logits, slopes);
        for (int64_t m = 0; m < size.M; ++m)
          store_lanes<T>(g_votes + m * JD, std::min<int64_t>(L, last - i - m * L), JD,
                         grad_votes + (b * n.N + i + m * L) * JD, JD);
      }
    });
  }
};

}  // namespace caps::cpu
