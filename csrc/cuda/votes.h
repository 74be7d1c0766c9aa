// Two ways of obtaining a vote: read where it is stored, or made anew as W u. Builds on seats.h.
#pragma once

#include "seats.h"

namespace caps::cuda {

// start(i, b0, di, db, count) announces `count` pairs of a capsule i and a tile of samples from b0 on, each (di, db)
// after the last; get(slot) then gives their votes in this order, and is called by all threads of the block.

template <class Real>
struct Source {
  const Real *votes, *inputs, *weight;  // votes, or inputs and weight
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
    const auto x = read(seat, source.votes + int64_t(i) * seat.z.J_D, int64_t(N) * seat.z.J_D, B, b0, slot);
    if (slot == seat.z.slots - 1)
      i += di, b0 += db;
    return x;
  }
};

// û = W u, from pieces of W and u that are copied to shared memory while the one before is used.
template <class Shape_, class Real_>
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
  bool arrived = false;

  __device__ RecomputedVotes(const Seat<Shape>& seat, Source<Real> source, int B, int N, Real* shared,
                             const Scratch& at)
      : seat(seat), z(seat.z), source(source), B(B), N(N), pieces(shared), inputs_at(at.inputs_at), piece(at.piece) {}

  __device__ void start(int first_i, int first_b, int step_i, int step_b, int count) {
    i = first_i, b0 = first_b, di = step_i, db = step_b, left = count;
    staged = slot = k0 = 0;
    arrived = false;
    stage();
  }

  __device__ void stage() {
    if (left > 0) {
      Real* const to = pieces + parity * piece;
      if constexpr (Shape::fixed) {
        // Both buffers hold the whole W_i already when only the samples change.
        constexpr int size = Shape::J_D * Shape::K, at_once = Shape::threads * pack<Real>;
        static_assert(size % at_once == 0);
        if (di != 0 || staged < 2)
#pragma unroll
          for (int e0 = 0; e0 < size; e0 += at_once) {
            const int e = e0 + threadIdx.x * pack<Real>;
            copy<pack<Real>>(to + e / (rows * Shape::K) * Shape::pitch + e % (rows * Shape::K),
                             source.weight + int64_t(i) * size + e, true);
          }
      } else {
        for (int e = threadIdx.x; e < z.lanes * rows * Shape::depth; e += blockDim.x) {
          const int k = e % Shape::depth, q = e / Shape::depth % rows, lane = e / (rows * Shape::depth);
          const int group = slot * z.lanes + lane, j = group / z.per_j, d = group % z.per_j * rows + q;
          const bool inside = group < z.groups && d < z.D && k0 + k < z.K;
          copy<1>(to + lane * Shape::pitch + e % (rows * Shape::depth),
                  source.weight + (inside ? ((int64_t(i) * z.J + j) * z.D + d) * z.K + k0 + k : 0), inside);
        }
      }
      // u is transposed on its way, a number at a time, so that a thread then loads its samples 16 bytes at a time.
      for (int e = threadIdx.x; e < z.tile * Shape::depth; e += blockDim.x) {
        const int k = e % Shape::depth, s = e / Shape::depth;
        const bool inside = b0 + s < B && k0 + k < z.K;
        copy<1>(to + inputs_at + k * z.stride + s,
                source.inputs + (inside ? (int64_t(b0 + s) * N + i) * z.K + k0 + k : 0), inside);
      }
      ++staged;
      k0 += Shape::depth;
      if (k0 >= z.K)
        k0 = 0, ++slot;
      if (slot == z.slots)
        slot = 0, i += di, b0 += db, --left;
    }
    __pipeline_commit();
  }

  template <int count>
  static __device__ void copy(Real* to, const Real* from, bool inside) {
    // Outside of the tensor nothing is read, and zeros arrive.
    __pipeline_memcpy_async(to, from, count * sizeof(Real), inside ? 0 : count * sizeof(Real));
  }

  // Before a barrier that the block needs anyhow: it then serves the next piece as well.
  __device__ void arrive() {
    __pipeline_wait_prior(0);
    arrived = true;
  }

  __device__ Fragment<Shape, Real> get(int) {
    Fragment<Shape, Real> x = {};
    for (int k1 = 0; k1 < z.K; k1 += z.depth) {
      if (!arrived) {
        __pipeline_wait_prior(0);
        __syncthreads();
      }
      arrived = false;
      weight = pieces + parity * piece + seat.lane * z.pitch;
      inputs = pieces + parity * piece + inputs_at + seat.sample();
      parity ^= 1;
      stage();
#pragma unroll
      for (int k = 0; k < Shape::depth; k += Shape::step) {
        Real w[rows][Shape::step];
#pragma unroll
        for (int q = 0; q < rows; ++q)
          load<Shape::step>(weight + q * Shape::depth + k, w[q]);
#pragma unroll
        for (int l = 0; l < Shape::step; ++l) {
          Real u[Shape::samples];
          load<Shape::samples>(inputs + (k + l) * z.stride, u);
#pragma unroll
          for (int q = 0; q < rows; ++q)
#pragma unroll
            for (int s = 0; s < Shape::samples; ++s)
              x.at[q][s] += w[q][l] * u[s];
        }
      }
    }
    return x;
  }
};

}  // namespace caps::cuda
