// Two ways of obtaining a vote: read where it is stored, or made anew as W u. Builds on seats.h.
#pragma once

#include "seats.h"

namespace caps::cuda {

// start(i, b0, di, db, count) announces `count` pairs of a capsule i and a tile of samples from b0 on, each (di, db)
// after the last; get(slot) then gives their votes in this order, and is called by all threads of the block.

// Votes, or inputs and weight. whole: rows of votes, or of W, are of 16 bytes each and begin at multiples of them.
template <class Real>
struct Source {
  const Real *votes = nullptr, *inputs = nullptr, *weight = nullptr;
  bool whole = false;
};

template <class Shape_, class Real_>
struct StoredVotes {
  using Shape = Shape_;
  using Real = Real_;
  static constexpr bool recompute = false;

  const Seat<Shape>& seat;
  const Source<Real> source;
  const int B, N;
  int i = 0, b0 = 0, di = 0, db = 0;

  __device__ StoredVotes(const Seat<Shape>& seat, Source<Real> source, int B, int N, Real*, const Scratch&)
      : seat(seat), source(source), B(B), N(N) {}
  __device__ void start(int first_i, int first_b, int step_i, int step_b, int) {
    i = first_i, b0 = first_b, di = step_i, db = step_b;
  }
  __device__ void arrive() {}
  __device__ Fragment<Shape, Real> get(int slot) {
    const int64_t pitch = int64_t(N) * seat.z.J_D;
    const auto x = read(seat, source.votes + (b0 * pitch + int64_t(i) * seat.z.J_D), pitch, B - b0, slot,
                        Shape::fixed || source.whole);
    if (slot == seat.z.slots - 1)
      i += di, b0 += db;
    return x;
  }
};

// û = W u, from pieces of W and u that are copied to shared memory while the one before is used. twice: every pair is
// gone through a second time after its votes, by each_piece.
template <class Shape_, class Real_, bool twice = false>
struct RecomputedVotes {
  using Shape = Shape_;
  using Real = Real_;
  static constexpr bool recompute = true;

  const Seat<Shape>& seat;
  const Shape& z;
  const Source<Real> source;
  const int B, N;
  Real* pieces;
  const int inputs_at, piece;
  const Real *weight = nullptr, *inputs = nullptr;  // this thread's part of the piece in use
  int i = 0, b0 = 0, di = 0, db = 0, left = 0, staged = 0;  // of the next piece to copy
  int slot = 0, k0 = 0, parity = 0;
  bool arrived = false, again = false;

  __device__ RecomputedVotes(const Seat<Shape>& seat, Source<Real> source, int B, int N, Real* shared,
                             const Scratch& at)
      : seat(seat), z(seat.z), source(source), B(B), N(N), pieces(shared), inputs_at(at.inputs_at), piece(at.piece) {}

  __device__ void start(int first_i, int first_b, int step_i, int step_b, int count) {
    i = first_i, b0 = first_b, di = step_i, db = step_b, left = count;
    staged = slot = k0 = 0;
    arrived = again = false;
    stage();
  }

  // Copies the next piece, if there is one left, to the buffer that is not in use.
  __device__ void stage() {
    if (left > 0) {
      CAPS_READ_THREAD(tid);
      Real* const to = pieces + parity * piece;
      if (!Shape::buffers_hold_weight || di != 0 || staged < 2)  // else they do already: only the samples change
        copy_weight(to, tid);
      copy_inputs(to + inputs_at, tid);
      advance();
    }
    __pipeline_commit();
  }

  // Rows of W_i, 16 bytes of each at a time. Where a lane has no row, another stands in: what is made of it is not
  // written.
  __device__ void copy_weight(Real* to, unsigned tid) {
    constexpr unsigned row_packs = Shape::depth / pack<Real>;
    const int k = tid % row_packs * pack<Real>, first = tid / row_packs, step = blockDim.x / row_packs;
    const Real* const W_i = source.weight + int64_t(i) * z.J_D * z.K + (k0 + k);
    to += first / rows * Shape::pitch + first % rows * Shape::depth + k;
    const auto copy_row = [&](int m) {
      const Real* const from = W_i + int64_t(z.row(slot * z.lanes * rows + first + m * step)) * z.K;
      Real* const at = to + m * (step / rows * Shape::pitch);
      if (Shape::fixed || source.whole)
        copy<pack<Real>>(at, from, true);
      else
#pragma unroll
        for (int l = 0; l < pack<Real>; ++l)
          copy<1>(at + l, k0 + k + l < z.K ? from + l : source.weight, k0 + k + l < z.K);
    };
    if constexpr (Shape::fixed) {
#pragma unroll
      for (int m = 0; m < int(rows * row_packs) / Shape::teams; ++m)
        copy_row(m);
    } else {
      for (int m = 0; first + m * step < z.lanes * rows; ++m)
        copy_row(m);
    }
  }

  // u is transposed on its way, a number at a time, so that a thread then loads its samples 16 bytes at a time. Beyond
  // the end of the batch the last sample stands in, as in read().
  __device__ void copy_inputs(Real* to, unsigned tid) {
    const int k = tid % Shape::depth;
    const bool inside = k0 + k < z.K;
    const Real* const from = source.inputs + (inside ? k0 + k : 0);
    to += k * z.stride;
#pragma unroll 1
    for (int s = tid / Shape::depth; s < z.tile; s += blockDim.x / Shape::depth)
      copy<1>(to + s, from + (int64_t(min(b0 + s, B - 1)) * N + i) * z.K, Shape::fixed || inside);
  }

  template <int count>
  static __device__ void copy(Real* to, const Real* from, bool inside) {
    // Beyond K zeros arrive, and nothing is read.
    __pipeline_memcpy_async(to, from, count * sizeof(Real), inside ? 0 : count * sizeof(Real));
  }

  // From a piece to the next: of the K components, the slots, the rounds, and the pairs.
  __device__ void advance() {
    ++staged;
    k0 += Shape::depth;
    if (k0 >= z.K)
      k0 = 0, ++slot;
    if (slot == z.slots) {
      slot = 0;
      again = twice && !again;
      if (!again)
        i += di, b0 += db, --left;
    }
  }

  // Before a barrier that the block needs anyhow: it then serves the next piece as well.
  __device__ void arrive() {
    __pipeline_wait_prior(0);
    arrived = true;
  }

  // f(k0) for the pieces of a slot, while `weight` and `inputs` are this thread's part of each.
  template <class F>
  __device__ void each_piece(F&& f) {
#pragma unroll
    for (int first = 0; first < z.K; first += Shape::depth) {
      if (!arrived) {
        __pipeline_wait_prior(0);
        __syncthreads();
      }
      arrived = false;
      weight = pieces + parity * piece + seat.lane * Shape::pitch;
      inputs = pieces + parity * piece + inputs_at + seat.sample();
      parity ^= 1;
      stage();
      f(first);
    }
  }

  // f(l, w, u) for `count` components of the piece, from k on: number l of them, its rows of W, its samples of u.
  template <int count, class F>
  __device__ void each_component(int k, F&& f) {
#pragma unroll
    for (int first = 0; first < count; first += Shape::step) {
      Real w[rows][Shape::step];
#pragma unroll
      for (int q = 0; q < rows; ++q)
        load<Shape::step>(weight + q * Shape::depth + k + first, w[q]);
#pragma unroll
      for (int l = 0; l < Shape::step; ++l) {
        Real u[Shape::samples], column[rows];
        load<Shape::samples>(inputs + (k + first + l) * z.stride, u);
#pragma unroll
        for (int q = 0; q < rows; ++q)
          column[q] = w[q][l];
        f(first + l, column, u);
      }
    }
  }

  __device__ Fragment<Shape, Real> get(int) {
    Fragment<Shape, Real> x = {};
    each_piece([&](int) {
      each_component<Shape::depth>(0, [&](int, const Real* w, const Real* u) {
#pragma unroll
        for (int q = 0; q < rows; ++q)
#pragma unroll
          for (int s = 0; s < Shape::samples; ++s)
            x.at[q][s] += w[q] * u[s];
      });
    });
    return x;
  }
};

}  // namespace caps::cuda
