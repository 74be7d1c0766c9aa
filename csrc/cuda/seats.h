// A thread's place in its block, and its fragments of votes or sums: `rows` components of one j for a few samples, in
// registers or in scratch, read from and written to tensors. Builds on sizes.h.
#pragma once

#include "sizes.h"

namespace caps::cuda {

// ---- fragments of numbers -------------------------------------------------------------------------------------------

template <class Shape, class Real>
struct Fragment {
  Real at[rows][Shape::samples];
};

template <class Shape, class Real>
__device__ Fragment<Shape, Real> scaled(Real scale, Fragment<Shape, Real> x) {
#pragma unroll
  for (int q = 0; q < rows; ++q)
#pragma unroll
    for (int s = 0; s < Shape::samples; ++s)
      x.at[q][s] *= scale;
  return x;
}

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
  constexpr int size = count < pack<Real> ? count : pack<Real>;
#pragma unroll
  for (int first = 0; first < count; first += size) {
    Pack<Real, size> x;
#pragma unroll
    for (int s = 0; s < size; ++s)
      x.at[s] = from[first + s];
    *reinterpret_cast<Pack<Real, size>*>(to + first) = x;
  }
}

// ---- seats ----------------------------------------------------------------------------------------------------------

// The place of a thread in its block. Some lanes may have no group in a slot, and a few threads no team: they work as
// the others do, on zeros or on what another has, and write nothing.
template <class Shape>
struct Seat {
  const Shape& z;
  int lane, team;
  bool active = true;

  __device__ explicit Seat(const Shape& z) : z(z) {
    CAPS_READ_THREAD(tid);
    if constexpr (Shape::fixed) {
      lane = tid / 32 * Shape::warp_lanes + tid % Shape::warp_lanes;
      team = tid % 32 / Shape::warp_lanes;
    } else {
      lane = tid % z.lanes;
      team = tid / z.lanes;
      active = team < z.teams;
      team = min(team, z.teams - 1);
    }
  }
  __device__ int group(int slot) const { return slot * z.lanes + lane; }
  __device__ bool owns(int slot) const { return active && group(slot) < z.groups; }
  __device__ int j(int slot) const { return min(group(slot) / z.per_j, z.J - 1); }
  __device__ int d(int slot) const { return group(slot) % z.per_j * rows; }
  __device__ int sample() const { return team * Shape::samples; }
};

// f(item) for the block's items: one, but for AnySizes, which may have fewer blocks for the sake of the workspace.
template <class Shape, class F>
__device__ void each_item(int64_t items, F&& f) {
  if constexpr (Shape::fixed)
    f(blockIdx.x);
  else
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x)
      f(item);
}

template <class Shape, class F>
__device__ void each_slot(const Shape& z, F&& f) {
#pragma unroll
  for (int slot = 0; slot < z.slots; ++slot)
    f(slot);
}

// Whether registers have room for V and gs as well, from their first use to their last.
template <class Shape>
constexpr bool holds = Shape::in_registers && Shape::held_slots == 1;

// ---- where a thread keeps its fragments -----------------------------------------------------------------------------

// A thread's fragments, one per slot: in registers, or in global scratch as rows [q, group] of the samples of the tile.
template <class Shape, class Real, bool in_registers = Shape::in_registers>
struct Fragments {
  Fragment<Shape, Real> at[Shape::held_slots];
  __device__ Fragments(const Seat<Shape>&, Real*) {}
  __device__ Fragment<Shape, Real> get(int slot) const { return at[Shape::held_slots == 1 ? 0 : slot]; }
  __device__ void put(int slot, const Fragment<Shape, Real>& x) { at[Shape::held_slots == 1 ? 0 : slot] = x; }
};

template <class Shape, class Real>
struct Fragments<Shape, Real, false> {
  const Seat<Shape>& seat;
  Real* array;
  __device__ Fragments(const Seat<Shape>& seat, Real* array) : seat(seat), array(array) {}
  __device__ Real* row(int slot, int q) const {
    return array + (int64_t(q) * seat.z.groups + seat.group(slot)) * seat.z.stride + seat.sample();
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

// The thread's part of an array [left, ...], a tile's and what follows, whose samples lie `pitch` apart. Beyond its end
// the last sample stands in, and for a lane without a group the last j: what is made of them is not written. whole:
// every fragment's rows begin at a multiple of 16 bytes.
template <class Shape, class Real, class Pitch>
__device__ Fragment<Shape, Real> read(const Seat<Shape>& seat, const Real* array, Pitch pitch, int left, int slot,
                                      bool whole) {
  Fragment<Shape, Real> x;
  const int row_at = seat.j(slot) * seat.z.D + seat.d(slot);
#pragma unroll
  for (int s = 0; s < Shape::samples; ++s) {
    const Real* const from = array + (min(seat.sample() + s, left - 1) * pitch + row_at);
    Real row[rows];
    if (whole)
      load<rows>(from, row);
    else
#pragma unroll
      for (int q = 0; q < rows; ++q)
        row[q] = seat.d(slot) + q < seat.z.D ? from[q] : 0;
#pragma unroll
    for (int q = 0; q < rows; ++q)
      x.at[q][s] = row[q];
  }
  return x;
}

template <class Shape, class Real, class Pitch>
__device__ void write(const Seat<Shape>& seat, Real* array, Pitch pitch, int left, int slot, bool whole,
                      const Fragment<Shape, Real>& x) {
  const int row_at = seat.j(slot) * seat.z.D + seat.d(slot);
#pragma unroll
  for (int s = 0; s < Shape::samples; ++s) {
    Real* const to = array + ((seat.sample() + s) * pitch + row_at);
    Real row[rows];
#pragma unroll
    for (int q = 0; q < rows; ++q)
      row[q] = x.at[q][s];
    if (seat.sample() + s < left && seat.owns(slot)) {
      if (whole)
        store<rows>(row, to);
      else
#pragma unroll
        for (int q = 0; q < rows; ++q)
          if (seat.d(slot) + q < seat.z.D)
            to[q] = row[q];
    }
  }
}

}  // namespace caps::cuda
