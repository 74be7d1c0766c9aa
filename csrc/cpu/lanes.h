// SIMD lanes: vectors, memory for them, transposes between a matrix in memory and its lanes, and work for all threads.
// Everything else on the CPU is vertical over these lanes; what a lane stands for, linear.h, routing.h and
// small_maps.h decide.
#pragma once

#include "../caps.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

namespace caps::cpu {

// ---- vectors --------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T>
struct Simd {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // shuffles take indices as wide as the lanes
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
Vec<T> load(const T* from) {  // by memcpy: rows of a tensor are aligned to numbers, not to vectors
  Vec<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
void store(T* to, Vec<T> x) {
  std::memcpy(to, &x, sizeof x);
}

// The first `count` numbers of a vector, or all of it where there are as many; beyond them loads give 0.
template <class T>
Vec<T> load_some(const T* from, int64_t count) {
  if (count >= lanes<T>) return load(from);
  Vec<T> x{};
  std::memcpy(&x, from, std::max<int64_t>(0, count) * sizeof(T));
  return x;
}

template <class T>
void store_some(T* to, Vec<T> x, int64_t count) {
  if (count >= lanes<T>)
    store(to, x);
  else
    std::memcpy(to, &x, std::max<int64_t>(0, count) * sizeof(T));
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

// f(first, last) for ranges of tasks; with a grain of one, since a task is a large piece of work.
template <class F>
void parallel(int64_t tasks, const F& f) {
  if (tasks > 0) torch::stable::parallel_for(0, tasks, 1, f);
}

// ---- transposes: a matrix in memory, and its rows or columns in the lanes -------------------------------------------

// Lane of (a, b) that ends in lane l when units of P lanes of a's and b's lower (or upper) halves are interleaved, within
// each of `parts` parts of a vector.
template <int L, int P, int parts>
constexpr int interleaved(int l, bool upper) {
  constexpr int part = L / parts;
  const int unit = l % part / P;
  return l / part * part + (unit / 2 + (upper ? part / P / 2 : 0)) * P + l % P + (unit % 2 ? L : 0);
}

template <class T, int P, int parts, bool upper, size_t... l>
Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<l...>) {
  constexpr int L = lanes<T>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, interleaved<L, P, parts>(l, upper)...);
#else
  return __builtin_shuffle(a, b, typename Simd<T>::IntVec{interleaved<L, P, parts>(l, upper)...});
#endif
}

// One step for each of `parts` groups of rows, whose first half is interleaved with the second within parts of vectors.
template <class T, int P, int parts, int rows>
inline void interleave_rows(Vec<T> (&x)[rows]) {
  constexpr auto all = std::make_index_sequence<lanes<T>>();
  constexpr int half = rows / parts / 2;
  Vec<T> y[rows];
#pragma GCC unroll 16
  for (int r = 0; r < rows / 2; ++r) {
    const int from = r / half * 2 * half + r % half, to = r / half * 2 * half + r % half * 2;
    y[to] = interleave<T, P, parts, false>(x[from], x[from + half], all);
    y[to + 1] = interleave<T, P, parts, true>(x[from], x[from + half], all);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
    x[r] = y[r];
}

// Transposes a square matrix of units of P numbers, row r in x[r]. Interleaving the first half of the rows with the
// second doubles each position modulo (count - 1); after log2(rows) times that is the transpose. In vectors of 32 bytes,
// whose halves AVX2 interleaves apart in one instruction, quarters of the matrix change places first.
template <class T, int P>
inline void transpose(Vec<T> (&x)[lanes<T> / P]) {
  constexpr int rows = lanes<T> / P, parts = vector_bytes == 32 ? 2 : 1;
  if constexpr (parts == 2 && rows > 1) {
    constexpr auto all = std::make_index_sequence<lanes<T>>();
#pragma GCC unroll 4
    for (int r = 0; r < rows / 2; ++r) {
      const Vec<T> a = x[r], b = x[r + rows / 2];
      x[r] = interleave<T, lanes<T> / 2, 1, false>(a, b, all);
      x[r + rows / 2] = interleave<T, lanes<T> / 2, 1, true>(a, b, all);
    }
  }
#pragma GCC unroll 4
  for (int step = parts; step < rows; step *= 2)
    interleave_rows<T, P, parts>(x);
}

// Lane r of the result: the sum over the lanes of x[r].
template <class T>
inline Vec<T> row_sums(Vec<T> (&x)[lanes<T>]) {
  constexpr auto all = std::make_index_sequence<lanes<T>>();
#pragma GCC unroll 4
  for (int rows = lanes<T> / 2; rows > 0; rows /= 2)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
      x[r] = interleave<T, 1, 1, false>(x[r], x[r + rows], all) + interleave<T, 1, 1, true>(x[r], x[r + rows], all);
  return x[0];
}

// Every other lane of a and b, the first or the second.
template <class T, size_t... l>
Vec<T> every_other(Vec<T> a, Vec<T> b, bool second, std::index_sequence<l...>) {
#if defined(__clang__)
  return second ? __builtin_shufflevector(a, b, int(2 * l + 1)...) : __builtin_shufflevector(a, b, int(2 * l)...);
#else
  using Index = typename Simd<T>::IntVec;
  return second ? __builtin_shuffle(a, b, Index{2 * l + 1 ...}) : __builtin_shuffle(a, b, Index{2 * l ...});
#endif
}

// Lane r of the result: the sum of numbers r K .. r K + K - 1 of all that x holds, K a power of two.
template <class T, int K>
inline Vec<T> segment_sums(Vec<T> (&x)[K]) {
  constexpr auto all = std::make_index_sequence<lanes<T>>();
#pragma GCC unroll 4
  for (int count = K / 2; count > 0; count /= 2)
#pragma GCC unroll 16
    for (int r = 0; r < count; ++r)
      x[r] = every_other<T>(x[2 * r], x[2 * r + 1], false, all) + every_other<T>(x[2 * r], x[2 * r + 1], true, all);
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
    if (width == 1) {
      T* const column = reinterpret_cast<T*>(to + c);
      for (int r = 0; r < L; ++r)
        column[r] = r < rows ? block[r * from.stride] : T(0);
      continue;
    }
    Vec<T> x[L];
    // Whole vectors, even where the row ends sooner: what lies behind it is not kept, but has to lie in the tensor.
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
    if (width == 1) {
      for (int r = 0; r < rows; ++r)
        to[c + r * stride] = from[c][r];
      continue;
    }
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
    } else if (width == L / 2) {  // 8 floats: of a size that is known, a copy is one instruction
      for (int r = 0; r < rows; ++r)
        std::memcpy(block + r * stride, &x[r], sizeof(Vec<T>) / 2);
    } else {
      for (int r = 0; r < rows; ++r)
        std::memcpy(block + r * stride, &x[r], width * sizeof(T));
    }
  }
}

}  // namespace caps::cpu
