// A thread's place in its block, and its fragment of votes or sums: `rows` components of one j for a few samples, in
// registers or in scratch, read from and written to tensors. Builds on sizes.h.
#pragma once

#include "sizes.h"

namespace caps::cuda {

// ---- fragments of numbers -------------------------------------------------------------------------------------------

template <class Shape, class Real>
struct Fragment {
  Real at[rows][Shape::samples];
};

// Consecutive numbers that start at a multiple of their size, or of 16 bytes.
template <int count, class Real>
__device__ void load(const Real* from, Real* to) {
  constexpr int size = count < pack<Real> ? count : pack<Real>;
#pragma unroll
  for (int first = 0; first < count; first += size) {
    const auto x = *reinterpret_cast<const Pack<Real, size>*>(from + first);
#pragma unroll
    for (int s = 0; s < size; ++s)
      to[first + s] = x.at[s];
  }
}

template <int count, class Real>
__device__ void store(const Real* from, Real* to) {
#pragma unroll
  for (int first = 0; first < count; first += pack<Real>) {
    Pack<Real> x;
#pragma unroll
    for (int s = 0; s < pack<Real>; ++s)
      x.at[s] = from[first + s];
    *reinterpret_cast<Pack<Real>*>(to + first) = x;
  }
}

// ---- seats ----------------------------------------------------------------------------------------------------------

// The place of a thread in its block. The few threads beyond the last team repeat its work and write nothing.
template <class Shape>
struct Seat {
  const Shape& z;
  int lane, team;
  bool active = true;

  __device__ explicit Seat(const Shape& z) : z(z) {
    const int tid = threadIdx.x;
    // A warp is 8 lanes of each of the 4 teams. It so reads 8 groups' rows of W and 4 teams' samples of u, 64 bytes of
    // shared memory each, where 32 lanes of one team would read 256 and 16; and all samples of a tile meet in a warp,
    // which adds their parts of gW by shuffles.
    if constexpr (Shape::fixed) {
      lane = tid / 32 * 8 + tid % 8;
      team = tid % 32 / 8;
    } else {
      active = tid / z.lanes < z.teams;
      lane = tid % z.lanes;
      team = active ? tid / z.lanes : z.teams - 1;
    }
  }
  __device__ int group(int slot) const { return slot * z.lanes + lane; }
  __device__ bool owns(int slot) const { return active && group(slot) < z.groups; }
  __device__ int j(int slot) const { return group(slot) / z.per_j; }
  __device__ int d(int slot) const { return group(slot) % z.per_j * rows; }
  __device__ int sample() const { return team * Shape::samples; }
};

// ---- where a thread keeps its fragments -----------------------------------------------------------------------------

// A thread's fragments, one per slot: in a register, or in scratch as rows [q, group] of the samples of the tile.
template <class Shape, class Real, bool in_registers = Shape::fixed>
struct Fragments {
  Fragment<Shape, Real> only;
  __device__ Fragments(const Seat<Shape>&, Real*) {}
  __device__ Fragment<Shape, Real> get(int) const { return only; }
  __device__ void put(int, const Fragment<Shape, Real>& x) { only = x; }
};

template <class Shape, class Real>
struct Fragments<Shape, Real, false> {
  const Seat<Shape>& seat;
  Real* array;
  __device__ Fragments(const Seat<Shape>& seat, Real* array) : seat(seat), array(array) {}
  __device__ Real* row(int slot, int q) const {
    return array + int64_t(q * seat.z.groups + seat.group(slot)) * seat.z.stride + seat.sample();
  }
  __device__ Fragment<Shape, Real> get(int slot) const {
    Fragment<Shape, Real> x = {};
    if (seat.owns(slot))
      for (int q = 0; q < rows; ++q)
        load<Shape::samples>(row(slot, q), x.at[q]);
    return x;
  }
  __device__ void put(int slot, const Fragment<Shape, Real>& x) const {
    if (seat.owns(slot))
#pragma unroll
      for (int q = 0; q < rows; ++q)
        store<Shape::samples>(x.at[q], row(slot, q));
  }
};

// ---- fragments of tensors -------------------------------------------------------------------------------------------

// The thread's part of an array [B, ...] whose samples lie `pitch` apart; 0 beyond its end.
template <class Shape, class Real>
__device__ Fragment<Shape, Real> read(const Seat<Shape>& seat, const Real* array, int64_t pitch, int B, int b0,
                                      int slot) {
  Fragment<Shape, Real> x;
  const Real* from = array + (b0 + seat.sample()) * pitch + seat.j(slot) * seat.z.D + seat.d(slot);
#pragma unroll
  for (int s = 0; s < Shape::samples; ++s, from += pitch) {
    Real row[rows] = {};
    if (b0 + seat.sample() + s < B) {
      if constexpr (Shape::fixed)
        load<rows>(from, row);
      else
        for (int q = 0; q < rows; ++q)
          row[q] = seat.owns(slot) && seat.d(slot) + q < seat.z.D ? from[q] : 0;
    }
#pragma unroll
    for (int q = 0; q < rows; ++q)
      x.at[q][s] = row[q];
  }
  return x;
}

template <class Shape, class Real>
__device__ void write(const Seat<Shape>& seat, Real* array, int64_t pitch, int B, int b0, int slot,
                      const Fragment<Shape, Real>& x) {
  Real* to = array + (b0 + seat.sample()) * pitch + seat.j(slot) * seat.z.D + seat.d(slot);
#pragma unroll
  for (int s = 0; s < Shape::samples; ++s, to += pitch) {
    Real row[rows];
#pragma unroll
    for (int q = 0; q < rows; ++q)
      row[q] = x.at[q][s];
    if (b0 + seat.sample() + s < B) {
      if constexpr (Shape::fixed)
        store<rows>(row, to);
      else
        for (int q = 0; q < rows; ++q)
          if (seat.owns(slot) && seat.d(slot) + q < seat.z.D)
            to[q] = row[q];
    }
  }
}

}  // namespace caps::cuda
