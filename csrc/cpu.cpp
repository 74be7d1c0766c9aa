// The operators on the CPU, float32 and float64.
//
// Everything is vertical over SIMD lanes; only the meaning of a lane differs:
//   capsule_linear   a lane is a sample: 16 samples share each number of W_i, and votes live in registers and L1
//   routing          a lane is an input capsule of one sample, and votes are transposed as they are read; small
//                    batches of capsule_linear, which cannot fill the lanes with samples, go this way too
// The work is cut into (lane group × chunk of N) by the sizes alone and partial sums are added in a fixed order, so
// that a result does not depend on the number of threads.
#include "caps.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

namespace caps {
namespace {

// ---- SIMD lanes -----------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T>
struct Simd {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vec __attribute__((vector_size(vector_bytes)));
  typedef Int IntVec __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
constexpr int lanes = vector_bytes / sizeof(T);

template <int n>
using Const = std::integral_constant<int, n>;

template <class T>
Vec<T> load(const T* from) {
  Vec<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
void store(T* to, Vec<T> x) {
  std::memcpy(to, &x, sizeof x);
}

// Uninitialised, aligned scratch memory.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : start_(static_cast<Vec<T>*>(::operator new(count * sizeof(Vec<T>), std::align_val_t(vector_bytes)))) {}
  ~Buffer() { ::operator delete(start_, std::align_val_t(vector_bytes)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator Vec<T>*() const { return start_; }

 private:
  Vec<T>* start_;
};

template <class F>
void parallel(int64_t tasks, const F& f) {
  if (tasks > 0) torch::stable::parallel_for(0, tasks, 1, f);
}

// Lane of (a, b) that ends in lane l when units of P lanes of a's and b's lower (or upper) halves are interleaved.
template <int L, int P>
constexpr int interleaved(int l, bool upper) {
  const int unit = l / P;
  return (unit / 2 + (upper ? L / P / 2 : 0)) * P + l % P + (unit % 2 ? L : 0);
}

template <class T, int P, bool upper, size_t... l>
Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<l...>) {
  constexpr int L = lanes<T>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, interleaved<L, P>(l, upper)...);
#else
  return __builtin_shuffle(a, b, typename Simd<T>::IntVec{interleaved<L, P>(l, upper)...});
#endif
}

// Transposes a square matrix of units of P numbers, row r in x[r]. Interleaving the first half of the rows with the
// second doubles each position modulo (count - 1); after log2(rows) times that is the transpose.
template <class T, int P>
inline void transpose(Vec<T> (&x)[lanes<T> / P]) {
  constexpr int rows = lanes<T> / P;
  constexpr auto all = std::make_index_sequence<lanes<T>>();
#pragma GCC unroll 4
  for (int step = 1; step < rows; step *= 2) {
    Vec<T> y[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows / 2; ++r) {
      y[2 * r] = interleave<T, P, false>(x[r], x[r + rows / 2], all);
      y[2 * r + 1] = interleave<T, P, true>(x[r], x[r + rows / 2], all);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
      x[r] = y[r];
  }
}

// Lane r of the result: the sum over the lanes of x[r].
template <class T>
inline Vec<T> row_sums(Vec<T> (&x)[lanes<T>]) {
  constexpr auto all = std::make_index_sequence<lanes<T>>();
#pragma GCC unroll 4
  for (int rows = lanes<T> / 2; rows > 0; rows /= 2)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
      x[r] = interleave<T, 1, false>(x[r], x[r + rows], all) + interleave<T, 1, true>(x[r], x[r + rows], all);
  return x[0];
}

// A matrix in memory, rows `stride` apart; `end` bounds what may be read.
template <class T>
struct Rows {
  const T* start;
  int64_t stride;
  const T* end;
};

// to[c] = column c with row r in lane r; lanes from `rows` on are zero.
template <class T>
void load_lanes(Rows<T> from, int rows, int64_t columns, Vec<T>* to) {
  constexpr int L = lanes<T>;
  for (int64_t c = 0; c < columns; c += L) {
    const T* block = from.start + c;
    const int width = std::min<int64_t>(L, columns - c);
    Vec<T> x[L];
    if (rows == L && from.end - block >= (L - 1) * from.stride + L) {
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r)
        x[r] = load(block + r * from.stride);
    } else {
      for (int r = 0; r < L; ++r) {
        x[r] = Vec<T>{};
        if (r < rows) std::memcpy(&x[r], block + r * from.stride, width * sizeof(T));
      }
    }
    transpose<T, 1>(x);
    if (width == L) {
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r)
        to[c + r] = x[r];
    } else {
      std::memcpy(to + c, x, width * sizeof(Vec<T>));
    }
  }
}

template <class T>
void store_lanes(const Vec<T>* from, int rows, int64_t columns, T* to, int64_t stride) {
  constexpr int L = lanes<T>;
  for (int64_t c = 0; c < columns; c += L) {
    const int width = std::min<int64_t>(L, columns - c);
    Vec<T> x[L];
    if (width == L) {
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r)
        x[r] = from[c + r];
    } else {
      for (int r = 0; r < L; ++r)
        x[r] = r < width ? from[c + r] : Vec<T>{};
    }
    transpose<T, 1>(x);
    T* block = to + c;
    if (width == L) {
      for (int r = 0; r < rows; ++r)
        store(block + r * stride, x[r]);
    } else if (width == L / 2) {
      for (int r = 0; r < rows; ++r)
        std::memcpy(block + r * stride, &x[r], sizeof(Vec<T>) / 2);
    } else {
      for (int r = 0; r < rows; ++r)
        std::memcpy(block + r * stride, &x[r], width * sizeof(T));
    }
  }
}

// ---- exp, softmax, squash -------------------------------------------------------------------------------------------

template <class T>
struct ExpRange;
template <>
struct ExpRange<float> {
  static constexpr int degree = 7, mantissa = 23, bias = 127;
  static constexpr float lowest = -87, round = 0x1.8p23f, log2e = 0x1.715476p0f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
};
template <>
struct ExpRange<double> {
  static constexpr int degree = 13, mantissa = 52, bias = 1023;
  static constexpr double lowest = -708, round = 0x1.8p52, log2e = 0x1.71547652b82fep0;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
};

template <class T>
constexpr T inverse_factorial(int n) {
  T value = 1;
  for (int i = 2; i <= n; ++i)
    value /= i;
  return value;
}

// exp(x) for x <= 0, or NaN: 2^n exp(r) with x = n ln 2 + r. What would be subnormal is rounded up to the least normal.
template <class T>
inline Vec<T> exp_nonpositive(Vec<T> x) {
  using R = ExpRange<T>;
  using IntVec = typename Simd<T>::IntVec;
  x = x < R::lowest ? Vec<T>{} + R::lowest : x;
  const Vec<T> shifted = x * R::log2e + R::round;  // n in the low bits of the mantissa
  const Vec<T> n = shifted - R::round;
  const Vec<T> r = (x - n * R::ln2_high) - n * R::ln2_low;
  Vec<T> y = Vec<T>{} + inverse_factorial<T>(R::degree);
#pragma GCC unroll 16
  for (int i = R::degree - 1; i >= 0; --i)
    y = y * r + inverse_factorial<T>(i);
  const IntVec power = ((IntVec)shifted << R::mantissa) + ((typename Simd<T>::Int)R::bias << R::mantissa);
  return y * (Vec<T>)power;  // a product, so that NaN stays NaN
}

// b -> c, over J. A NaN is passed over by the maximum and returns through the sum.
template <class T>
inline void softmax(Vec<T>* b, int J) {
  Vec<T> largest = Vec<T>{} - std::numeric_limits<T>::infinity(), sum{};
  for (int j = 0; j < J; ++j)
    largest = b[j] > largest ? b[j] : largest;
  for (int j = 0; j < J; ++j) {
    b[j] = exp_nonpositive<T>(b[j] - largest);
    sum += b[j];
  }
  const Vec<T> inverse = 1 / sum;
  for (int j = 0; j < J; ++j)
    b[j] *= inverse;
}

// p -> h = c (p - Σ c p), the gradient with respect to the logits.
template <class T>
inline void softmax_backward(const Vec<T>* c, Vec<T>* p, int J) {
  Vec<T> mean{};
  for (int j = 0; j < J; ++j)
    mean += c[j] * p[j];
  for (int j = 0; j < J; ++j)
    p[j] = c[j] * (p[j] - mean);
}

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

// The capsule s [D] in X (a vector, or a plain number), scaled so that its square neither overflows nor vanishes.
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
  const X divisor = norm.square == 0 ? X{} + T(1) : norm.square;
  const X share = squash_slope(norm.length) * along / divisor;
  for (int d = 0; d < D; ++d)
    gs[d] = factor * (g[d] + share * (norm.scale * s[d]));
}

// ---- one block of input capsules, all lanes ---------------------------------------------------------------------------
//
// A block is M vectors of votes û [M, J, D]. Where they come from is the source's affair: its add() adds the votes of
// rows (j, d) to a block of registers. FixedD = 0 stands for any D, taken in smaller blocks.

struct Block {
  int M, J, D, T;
};

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

// sum [J, D] += Σ_m û_m: the first iteration but for the factor 1 / J.
template <class T, int FixedD, class Source>
inline void add_votes(const Source& source, Block n, Vec<T>* sum) {
  for (int j = 0; j < n.J; ++j) {
    for_rows<FixedD>(n.D, [&](auto R, int d) {
      Vec<T> x[R];
      Vec<T>* s = sum + j * n.D + d;
      for (int r = 0; r < R; ++r)
        x[r] = s[r];
      for (int m = 0; m < n.M; ++m)
        source.add(m, j * n.D + d, x);
      for (int r = 0; r < R; ++r)
        s[r] = x[r];
    });
  }
}

// sum [J, D] += Σ_m c_m û_m with c = softmax(û·V), or with h in the place of c where gs is given. votes, b and p are
// scratch of [M, J, D], [M, J] and [M, J].
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
        for (int r = 0; r < R; ++r) {
          logit += x[r] * V[row + r];
          if constexpr (!Source::stored) votes[m * rows + row + r] = x[r];
        }
        if (gs) {
          for (int r = 0; r < R; ++r)
            slope += x[r] * gs[row + r];
        }
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
      for (int r = 0; r < R; ++r)
        x[r] = sum[row + r];
      for (int m = 0; m < n.M; ++m) {
        const Vec<T> c = share[m * n.J + j];
        for (int r = 0; r < R; ++r)
          x[r] += c * votes[m * rows + row + r];
      }
      for (int r = 0; r < R; ++r)
        sum[row + r] = x[r];
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
          Vec<T> logit{}, slope{};
          for (int r = 0; r < R; ++r) {
            logit += x[r] * V[t * step + row + r];
            slope += x[r] * gs[(t + 1) * step + row + r];
          }
          b[t * MJ + at] += logit;
          p[t * MJ + at] += slope;
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
        for (int r = 0; r < R; ++r)
          grad[m * rows + row + r] = x[r];
      });
    }
  }
}

// ---- capsule_linear: a lane is a sample -------------------------------------------------------------------------------

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
    const int64_t small = G * lanes<T> / std::max<int64_t>(1, n.K);               // partial sums no larger than W
    chunk = std::max({std::min(cached, shared), small, block});
    chunk = (chunk + block - 1) / block * block;
    C = (n.N + chunk - 1) / chunk;
  }
};

template <class T>
int lanes_used(int64_t g, int64_t B) {
  return std::min<int64_t>(lanes<T>, B - g * lanes<T>);
}

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
        add_rows<P>(fold(x), gw + row * K + k, std::min<int64_t>(P, plan.JD - row), K, width, first);
      }
    }
  }

  // Numbers c·P .. of `from`, repeated over the lanes.
  template <int P>
  static Vec<T> spread(const Vec<T>* from, int c) {
    if constexpr (P == 1) {
      return Vec<T>{} + reinterpret_cast<const T*>(from)[c];
    } else {
      static_assert(P * sizeof(T) == sizeof(int64_t));
      typedef int64_t Pairs __attribute__((vector_size(vector_bytes)));
      int64_t pair;
      std::memcpy(&pair, reinterpret_cast<const char*>(from) + c * sizeof pair, sizeof pair);
      return (Vec<T>)(Pairs{} + pair);
    }
  }

  static Vec<T> fold(Vec<T> (&x)[1]) { return x[0]; }

  // Sums over neighbouring lanes: the first half of the lanes from x[0], the second from x[1].
  static Vec<T> fold(Vec<T> (&x)[2]) { return fold_pairs(x, std::make_index_sequence<L>()); }

  template <size_t... l>
  static Vec<T> fold_pairs(Vec<T> (&x)[2], std::index_sequence<l...>) {
#if defined(__clang__)
    return __builtin_shufflevector(x[0], x[1], (2 * l)...) + __builtin_shufflevector(x[0], x[1], (2 * l + 1)...);
#else
    using IntVec = typename Simd<T>::IntVec;
    return __builtin_shuffle(x[0], x[1], IntVec{(2 * l)...}) + __builtin_shuffle(x[0], x[1], IntVec{(2 * l + 1)...});
#endif
  }

  template <int P>
  static void add_rows(Vec<T> x, T* to, int rows, int64_t stride, int width, bool first) {
    if (rows == P && width == L / P && (P == 1 || stride == width)) {
      store(to, first ? x : x + load(to));
      return;
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < width; ++c)
        to[r * stride + c] = (first ? T(0) : to[r * stride + c]) + x[r * (L / P) + c];
  }
};

// ---- routing: a lane is an input capsule of one sample ----------------------------------------------------------------

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

  // f(sample) for all samples: one thread each, or one after the other with all threads on its chunks.
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

// ---- capsule_linear for small batches: too few samples for the lanes, so votes are made once ------------------------

// Measured. Up to here the votes are also half as large as the weight at most, or those of one sample.
bool is_small_batch(const Sizes& n) { return n.B <= std::max<int64_t>(1, n.K / 2); }

// The shape that routing sees.
Sizes votes_sizes(Sizes n) {
  n.K = 0;
  return n;
}

// û [B, N, J, D], with the rows of W_i in the lanes.
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
        const T* w_row = w + (i * JD + row) * K;  // reading W is most of the work: fetch it four blocks ahead
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
  typedef T Eight __attribute__((vector_size(8 * sizeof(T))));
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

// f(Linear instance): the models' capsules, 8 -> 16 dimensions, have their own.
template <class T, class F>
void with_linear(const Tensor& inputs, const Tensor& weight, const Sizes& n, F&& f) {
  if (n.K == 8 && n.D == 16)
    f(Linear<T, 8, 16>{n, data<T>(inputs), data<T>(weight)});
  else
    f(Linear<T, 0, 0>{n, data<T>(inputs), data<T>(weight)});
}

// ---- operators --------------------------------------------------------------------------------------------------------

// f(first number, rows) for each lane-full of capsules [D] in [.., D].
template <class T, class F>
void for_capsules(const Tensor& s, const F& f) {
  constexpr int L = lanes<T>;
  const int64_t D = s.size(s.dim() - 1), rows = D ? s.numel() / D : 0, groups = (rows + L - 1) / L;
  torch::stable::parallel_for(0, groups, 2048 / (D + 1) + 1, [&](int64_t begin, int64_t end) {
    Buffer<T> x(D), g(D);
    for (int64_t group = begin; group < end; ++group)
      f(group * L * D, std::min<int64_t>(L, rows - group * L), x, g);
  });
}

// v = squash(s) for a full set of lanes where no square leaves the range of T; there the sums of squares alone change
// places. Otherwise false.
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

Tensor squash(const Tensor& s_) {
  check_squash(s_);
  const Tensor s = torch::stable::contiguous(s_), v = torch::stable::empty_like(s);
  dispatch(s, [&](auto number) {
    using T = decltype(number);
    const int64_t D = s.size(s.dim() - 1);
    const T *from = data<T>(s), *end = from + s.numel();
    T* to = data<T>(v);
    const auto fast = D == 4 ? squash_rows<T, 4> : D == 8 ? squash_rows<T, 8> : D == 16 ? squash_rows<T, 16> : squash_rows<T, 0>;
    for_capsules<T>(s, [&](int64_t at, int rows, Vec<T>* x, Vec<T>*) {
      if (rows == lanes<T> && fast(from + at, D, to + at)) return;
      load_lanes<T>({from + at, D, end}, rows, D, x);
      squash_capsule<T>(x, x, D);
      store_lanes<T>(x, rows, D, to + at, D);
    });
  });
  return v;
}

Tensor squash_backward(const Tensor& grad_, const Tensor& s_) {
  check_squash_backward(grad_, s_);
  const Tensor grad = torch::stable::contiguous(grad_), s = torch::stable::contiguous(s_);
  const Tensor gs = torch::stable::empty_like(s);
  dispatch(s, [&](auto number) {
    using T = decltype(number);
    const int64_t D = s.size(s.dim() - 1), count = s.numel();
    for_capsules<T>(s, [&](int64_t at, int rows, Vec<T>* x, Vec<T>* g) {
      load_lanes<T>({data<T>(s) + at, D, data<T>(s) + count}, rows, D, x);
      load_lanes<T>({data<T>(grad) + at, D, data<T>(grad) + count}, rows, D, g);
      squash_capsule_backward<T>(x, g, x, D);
      store_lanes<T>(x, rows, D, data<T>(gs) + at, D);
    });
  });
  return gs;
}

std::tuple<Tensor, Tensor> routing(const Tensor& votes_, int64_t iterations) {
  const Sizes n = check_routing(votes_, iterations);
  const Tensor votes = torch::stable::contiguous(votes_);
  const Tensor output = empty(votes, {n.B, n.J, n.D}), sums = empty(votes, {n.T, n.B, n.J, n.D});
  dispatch(votes, [&](auto number) {
    using T = decltype(number);
    Routing<T>{n, data<T>(votes)}.forward(data<T>(output), data<T>(sums));
  });
  return {output, sums};
}

Tensor routing_backward(const Tensor& grad_, const Tensor& votes_, const Tensor& sums_) {
  const Sizes n = check_routing_backward(grad_, votes_, sums_);
  const Tensor grad = torch::stable::contiguous(grad_), votes = torch::stable::contiguous(votes_);
  const Tensor sums = torch::stable::contiguous(sums_), grad_votes = torch::stable::empty_like(votes);
  dispatch(votes, [&](auto number) {
    using T = decltype(number);
    Routing<T>{n, data<T>(votes)}.backward(data<T>(grad), data<T>(sums), data<T>(grad_votes));
  });
  return grad_votes;
}

std::tuple<Tensor, Tensor> capsule_linear(const Tensor& inputs_, const Tensor& weight_, int64_t iterations) {
  const Sizes n = check_capsule_linear(inputs_, weight_, iterations);
  const Tensor inputs = torch::stable::contiguous(inputs_), weight = torch::stable::contiguous(weight_);
  const Tensor output = empty(inputs, {n.B, n.J, n.D}), sums = empty(inputs, {n.T, n.B, n.J, n.D});
  dispatch(inputs, [&](auto number) {
    using T = decltype(number);
    if (is_small_batch(n)) {
      const Tensor votes = make_votes<T>(inputs, weight, n);
      Routing<T>{votes_sizes(n), data<T>(votes)}.forward(data<T>(output), data<T>(sums));
    } else {
      with_linear<T>(inputs, weight, n, [&](const auto& linear) { linear.forward(data<T>(output), data<T>(sums)); });
    }
  });
  return {output, sums};
}

std::tuple<Tensor, Tensor> capsule_linear_backward(const Tensor& grad_, const Tensor& inputs_, const Tensor& weight_,
                                                   const Tensor& sums_) {
  const Sizes n = check_capsule_linear_backward(grad_, inputs_, weight_, sums_);
  const Tensor grad = torch::stable::contiguous(grad_), sums = torch::stable::contiguous(sums_);
  const Tensor inputs = torch::stable::contiguous(inputs_), weight = torch::stable::contiguous(weight_);
  const Tensor grad_inputs = torch::stable::empty_like(inputs), grad_weight = torch::stable::empty_like(weight);
  dispatch(inputs, [&](auto number) {
    using T = decltype(number);
    if (is_small_batch(n)) {
      const Tensor votes = make_votes<T>(inputs, weight, n);  // and, in the same place, their gradient
      Routing<T>{votes_sizes(n), data<T>(votes)}.backward(data<T>(grad), data<T>(sums), data<T>(votes));
      linear_gradients(data<T>(votes), data<T>(inputs), data<T>(weight), n, data<T>(grad_inputs),
                       data<T>(grad_weight));
    } else {
      with_linear<T>(inputs, weight, n, [&](const auto& linear) {
        linear.backward(data<T>(grad), data<T>(sums), data<T>(grad_inputs), data<T>(grad_weight));
      });
    }
  });
  return {grad_inputs, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(caps, CPU, m) {
  m.impl("squash", TORCH_BOX(&squash));
  m.impl("squash_backward", TORCH_BOX(&squash_backward));
  m.impl("capsule_linear", TORCH_BOX(&capsule_linear));
  m.impl("capsule_linear_backward", TORCH_BOX(&capsule_linear_backward));
  m.impl("routing", TORCH_BOX(&routing));
  m.impl("routing_backward", TORCH_BOX(&routing_backward));
}

}  // namespace caps
