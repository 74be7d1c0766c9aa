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

// Threads that are to share a multiprocessor, which bounds their registers: 512 leave 128 to a thread, 384 leave 168.
// The backward pass holds gs besides V; and of blocks of more than 256 threads there is room for one anyhow.
template <class Shape>
constexpr int route_threads(Pass pass) {
  if (Shape::held_slots > 1)
    return 256;
  return Shape::max_threads > 256 || (Shape::fixed && pass == Pass::backward) ? 384 : 512;
}

// shares [chunks, B, J, D] of Σ_i c û, or of Σ_i h û; `workspace`: each block's scratch, if it is not in shared memory.
template <Pass pass, class Votes, class Shape = typename Votes::Shape, class Real = typename Votes::Real>
__global__ void __launch_bounds__(route_threads<Shape>(pass), 1)
    route(const Shape z, const Source<Real> source, const Route n, const Real* V, const Real* gs, Real* shares,
          Real* workspace) {
  constexpr bool backward = pass == Pass::backward;
  CAPS_SHARED(memory);
  Real* const shared = reinterpret_cast<Real*>(memory);
  const Scratch at(z, Votes::recompute, backward, false);
  Real* const scratch = Shape::in_registers ? shared + 2 * at.piece : workspace + blockIdx.x * at.size;
  const Seat<Shape> seat(z);
  Votes votes(seat, source, n.B, n.N, shared, at);
  Fragments<Shape, Real> kept(seat, scratch), result(seat, scratch + at.result);
  Fragments<Shape, Real, true> held_V(seat, nullptr), held_gs(seat, nullptr);

  each_item<Shape>(int64_t(n.tiles) * n.chunks, [&](int item) {
    const int chunk = item % n.chunks, b0 = item / n.chunks * z.tile;
    const int first = chunk * n.length, end = min(first + n.length, n.N);
    const auto fetch = [&](const Real* array, int slot) {
      return read(seat, array + int64_t(b0) * z.J_D, z.J_D, n.B - b0, slot, z.full_groups);
    };
    votes.start(first, b0, 1, 0, end - first);
    each_slot(z, [&](int slot) {
      result.put(slot, {});
      if constexpr (holds<Shape> && pass != Pass::uniform)
        held_V.put(slot, fetch(V, slot));
      if constexpr (holds<Shape> && backward)
        held_gs.put(slot, fetch(gs, slot));
    });

    for (int i = first; i < end; ++i) {
      if constexpr (pass == Pass::uniform) {
        each_slot(z, [&](int slot) {
          const auto x = votes.get(slot);
          auto sum = result.get(slot);
#pragma unroll
          for (int q = 0; q < rows; ++q)
#pragma unroll
            for (int s = 0; s < Shape::samples; ++s)
              sum.at[q][s] += x.at[q][s];
          result.put(slot, sum);
        });
      } else {
        each_slot(z, [&](int slot) {
          const auto x = votes.get(slot);
          kept.put(slot, x);
          put_dot(seat, scratch + at.logits, slot, x, holds<Shape> ? held_V.get(slot) : fetch(V, slot));
          if constexpr (backward)
            put_dot(seat, scratch + at.agreement, slot, x, holds<Shape> ? held_gs.get(slot) : fetch(gs, slot));
        });
        __syncthreads();
        couple<backward, !backward>(z, scratch + at.logits, scratch + at.agreement, scratch + at.coupling,
                                    scratch + at.change);
        votes.arrive();
        __syncthreads();
        each_slot(z, [&](int slot) {
          auto sum = result.get(slot);
          add_scaled(seat, scratch + (backward ? at.change : at.coupling), slot, kept.get(slot), sum);
          result.put(slot, sum);
        });
      }
    }

    each_slot(z, [&](int slot) {
      auto sum = result.get(slot);
      if constexpr (pass == Pass::uniform)
        sum = scaled(Real(1) / z.J, sum);
      write(seat, shares + (int64_t(chunk) * n.B + b0) * z.J_D, z.J_D, n.B - b0, slot, z.full_groups, sum);
    });
  });
}

}  // namespace caps::cuda
