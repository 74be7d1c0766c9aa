// The kernel `route`, one pass over the input capsules: Σ_i c û of an iteration, or Σ_i h û of its backward pass.
// Builds on votes.h and coupling.h.
#pragma once

#include "coupling.h"
#include "votes.h"

namespace caps::cuda {

enum class Pass { uniform, forward, backward };  // uniform: t = 1, where c = 1 / J

struct Route {
  int B, N, tiles, chunks, length;  // a chunk is `length` capsules
};

// shares [chunks, B, J, D] of Σ_i c û, or of Σ_i h û; `workspace`: each block's scratch, if not in shared memory.
template <Pass pass, class Votes, class Shape = typename Votes::Shape, class Real = typename Votes::Real>
__global__ void __launch_bounds__(Shape::max_threads, resident<Shape, Real>(pass == Pass::backward))
    route(const Shape z, const Source<Real> source, const Route n, const Real* V, const Real* gs, Real* shares,
          Real* workspace) {
  constexpr bool backward = pass == Pass::backward;
  CAPS_SHARED(memory);
  Real* const shared = reinterpret_cast<Real*>(memory);
  const Scratch at(z, Votes::recompute, backward, false);
  Real* const scratch = workspace ? workspace + blockIdx.x * at.size : shared + 2 * at.piece;
  const Seat<Shape> seat(z);
  Votes votes(seat, source, n.B, n.N, shared, at);
  Fragments<Shape, Real> kept(seat, scratch + at.kept), result(seat, scratch + at.result);
  Fragments<Shape, Real, true> kept_V(seat, nullptr), kept_gs(seat, nullptr);

  for (int item = blockIdx.x; item < n.tiles * n.chunks; item += gridDim.x) {
    const int chunk = item % n.chunks, b0 = item / n.chunks * z.tile;
    const int first = chunk * n.length, end = min(first + n.length, n.N);
    const auto fetch = [&](const Real* array, int slot) { return read(seat, array, z.J_D, n.B, b0, slot); };
    votes.start(first, b0, 1, 0, end - first);
    for (int slot = 0; slot < z.slots; ++slot)
      result.put(slot, {});
    if constexpr (Shape::fixed && pass != Pass::uniform)
      kept_V.put(0, fetch(V, 0));
    if constexpr (Shape::fixed && backward)
      kept_gs.put(0, fetch(gs, 0));

    for (int i = first; i < end; ++i) {
      if constexpr (pass == Pass::uniform) {
        for (int slot = 0; slot < z.slots; ++slot) {
          const auto x = votes.get(slot);
          auto sum = result.get(slot);
#pragma unroll
          for (int q = 0; q < rows; ++q)
#pragma unroll
            for (int s = 0; s < Shape::samples; ++s)
              sum.at[q][s] += x.at[q][s];
          result.put(slot, sum);
        }
      } else {
        for (int slot = 0; slot < z.slots; ++slot) {
          const auto x = votes.get(slot);
          kept.put(slot, x);
          put_dot(seat, scratch + at.logits, slot, x, Shape::fixed ? kept_V.get(0) : fetch(V, slot));
          if constexpr (backward)
            put_dot(seat, scratch + at.agreement, slot, x, Shape::fixed ? kept_gs.get(0) : fetch(gs, slot));
        }
        __syncthreads();
        couple<backward>(z, scratch + at.logits, scratch + at.agreement, scratch + at.coupling, scratch + at.change);
        votes.arrive();
        __syncthreads();
        for (int slot = 0; slot < z.slots; ++slot) {
          auto sum = result.get(slot);
          add_scaled(seat, scratch + (backward ? at.change : at.coupling), slot, kept.get(slot), sum);
          result.put(slot, sum);
        }
      }
    }

    for (int slot = 0; slot < z.slots; ++slot) {
      auto sum = result.get(slot);
      if constexpr (pass == Pass::uniform)
#pragma unroll
        for (int q = 0; q < rows; ++q)
#pragma unroll
          for (int s = 0; s < Shape::samples; ++s)
            sum.at[q][s] *= Real(1) / z.J;
      if (seat.active)
        write(seat, shares + int64_t(chunk) * n.B * z.J_D, z.J_D, n.B, b0, slot, sum);
    }
  }
}

}  // namespace caps::cuda
