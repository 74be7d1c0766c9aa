// The kernel `gradients`, the last pass: gû of every vote, and from it the gradients of inputs and weight, or of the
// votes. Builds on votes.h and coupling.h.
#pragma once

#include "coupling.h"
#include "votes.h"

#include <type_traits>

namespace caps::cuda {

struct Gradients {
  int B, N, T, splits, length;  // a split is `length` samples; each makes its own gW
};

// Threads that are to share a multiprocessor, as route_threads() of route.h: two slots hold twice as much.
template <class Shape>
constexpr int gradients_threads() {
  return Shape::held_slots > 1 ? 256 : 512;
}

// ---- what becomes of gû ---------------------------------------------------------------------------------------------

// What becomes of gû_ij for a capsule i, tile of samples by tile of samples. Stored votes: it is the result.
template <class Votes>
struct VoteGradients;

template <class Shape, class Real>
struct VoteGradients<StoredVotes<Shape, Real>> {
  const Seat<Shape>& seat;
  const Gradients& n;
  Real* const grad_votes;

  __device__ VoteGradients(const Seat<Shape>& seat, StoredVotes<Shape, Real>&, const Gradients& n, Real* grad_votes,
                           Real*, Real*, Real*)
      : seat(seat), n(n), grad_votes(grad_votes) {}
  __device__ void begin(int, int) {}
  __device__ void tile(int i, int b0, int end, const Fragments<Shape, Real>& result) {
    const int64_t pitch = int64_t(n.N) * seat.z.J_D;
    each_slot(seat.z, [&](int slot) {
      write(seat, grad_votes + (b0 * pitch + int64_t(i) * seat.z.J_D), pitch, end - b0, slot, seat.z.full_groups,
            result.get(slot));
    });
  }
  __device__ void finish(int) {}
};

// W u: gu_bi = Σ_j W_ijᵀ gû_ij, and the sum of gW_ij = Σ_b gû_ij u_biᵀ. At the models' K and D from registers: a warp's
// lanes are left with parts of gu, and its teams with rows of gW.
template <class Shape_, class Real>
struct RegisterGradients {
  using Shape = Shape_;
  using Votes = RecomputedVotes<Shape, Real, Shape::ends_in_pieces>;
  static constexpr int K = Shape::K, samples = Shape::samples, half = K / 2;  // half of gu at a time: less registers
  static constexpr int tile_size = Shape::tile * K, own_rows = rows / Shape::teams;
  static_assert(!Shape::ends_in_pieces || Shape::depth == half);
  const Seat<Shape>& seat;
  Votes& votes;
  const Gradients& n;
  Real *const grad_inputs, *const grad_weights, *const partial;
  Real* grad_weight = nullptr;
  Real gw[Shape::slots][rows * K];

  __device__ RegisterGradients(const Seat<Shape>& seat, Votes& votes, const Gradients& n, Real* grad_inputs,
                               Real* grad_weights, Real* partial, Real*)
      : seat(seat), votes(votes), n(n), grad_inputs(grad_inputs), grad_weights(grad_weights), partial(partial) {}

  __device__ void begin(int, int split) {
    grad_weight = grad_weights + int64_t(split) * n.N * seat.z.J_D * K;
#pragma unroll
    for (auto& row : gw)
#pragma unroll
      for (Real& x : row)
        x = 0;
  }

  __device__ void tile(int i, int b0, int end, const Fragments<Shape, Real>& result) {
#pragma unroll
    for (int slot = 0; slot < Shape::slots; ++slot) {
      auto gv = result.get(slot);
      if (!seat.owns(slot) || b0 + seat.sample() + samples > end)  // else what stands in for others would count
#pragma unroll
        for (int q = 0; q < rows; ++q)
#pragma unroll
          for (int s = 0; s < samples; ++s)
            gv.at[q][s] = seat.owns(slot) && b0 + seat.sample() + s < end ? gv.at[q][s] : 0;
      if constexpr (Shape::ends_in_pieces) {
        votes.each_piece([&](int k0) { multiply(slot, gv, k0, 0); });
      } else {
        multiply(slot, gv, 0, 0);
        multiply(slot, gv, half, half);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (unsigned e = threadIdx.x; e < tile_size; e += blockDim.x) {
      const int s = e / K;
      Real sum = 0;
#pragma unroll 4
      for (int w = 0; w < seat.z.threads / 32; ++w)
        sum += partial[w * tile_size + e % K * Shape::tile + s];
      if (b0 + s < end)
        grad_inputs[(int64_t(b0 + s) * n.N + i) * K + e % K] = sum;
    }
  }

  // Components k0 .. k0 + K / 2 - 1, which begin at `at` in the piece in use.
  __device__ void multiply(int slot, const Fragment<Shape, Real>& gv, int k0, int at) {
    Real gu[half * samples] = {};
    votes.template each_component<half>(at, [&](int l, const Real* w, const Real* u) {
#pragma unroll
      for (int q = 0; q < rows; ++q)
#pragma unroll
        for (int s = 0; s < samples; ++s) {
          gu[l * samples + s] += w[q] * gv.at[q][s];
          gw[slot][q * K + k0 + l] += gv.at[q][s] * u[s];
        }
    });
    scatter_sums<half * samples, Shape::warp_lanes / 2, 1>(gu);
    constexpr int left = half * samples > Shape::warp_lanes ? half * samples / Shape::warp_lanes : 1;
    constexpr int sharing = left * Shape::warp_lanes / (half * samples);  // threads that are left with the same number
    const int lane = threadIdx.x % Shape::warp_lanes, own = lane / sharing * left;  // of the [K / 2, samples]
    Real* const part = partial + threadIdx.x / 32 * tile_size + (k0 + own / samples) * Shape::tile + seat.sample();
    if (lane % sharing == 0)
#pragma unroll
      for (int s = 0; s < left; ++s)
        part[own % samples + s] = slot ? part[own % samples + s] + gu[s] : gu[s];
  }

  __device__ void finish(int i) {
#pragma unroll
    for (int slot = 0; slot < Shape::slots; ++slot) {
      if constexpr (Shape::teams > 1)
        scatter_sums<rows * K, 16, Shape::warp_lanes>(gw[slot]);
      if (seat.owns(slot))
        store<own_rows * K>(gw[slot], grad_weight + (int64_t(i) * seat.z.J_D + seat.group(slot) * rows +
                                                     seat.team * own_rows) * K);
    }
  }
};

// Else from gû in global scratch: a thread takes one k and every so-manieth row of W_i.
template <class Shape_, class Real>
struct ScratchGradients {
  using Shape = Shape_;
  using Votes = RecomputedVotes<Shape, Real>;
  static constexpr int samples = Shape::samples;
  const Seat<Shape>& seat;
  Votes& votes;
  const Gradients& n;
  Real *const grad_inputs, *const grad_weights, *const partial, *const grad_votes;
  Real* grad_weight = nullptr;

  __device__ ScratchGradients(const Seat<Shape>& seat, Votes& votes, const Gradients& n, Real* grad_inputs,
                              Real* grad_weights, Real* partial, Real* grad_votes)
      : seat(seat), votes(votes), n(n), grad_inputs(grad_inputs), grad_weights(grad_weights), partial(partial),
        grad_votes(grad_votes) {}

  __device__ void begin(int i, int split) {
    const int64_t size = int64_t(seat.z.J_D) * seat.z.K;
    grad_weight = grad_weights + split * n.N * size;
    for (int64_t e = threadIdx.x; e < size; e += blockDim.x)
      grad_weight[i * size + e] = 0;
  }

  __device__ void tile(int i, int b0, int end, const Fragments<Shape, Real>& result) {
    const Shape& z = seat.z;
    if constexpr (Shape::in_registers)
      Fragments<Shape, Real, false>(seat, grad_votes).put(0, result.get(0));
    const int deep = z.K < z.threads ? z.K : z.threads, row_lanes = z.threads / deep;
    const int l = threadIdx.x % deep, row_lane = threadIdx.x / deep;
    __syncthreads();
    for (int k0 = 0; k0 < z.K; k0 += deep) {
      if (k0 + l < z.K && row_lane < row_lanes)
        for (int team = 0; team < z.teams; ++team)
          multiply(i, b0 + team * samples, end, grad_votes + team * samples, k0 + l, row_lane, row_lanes,
                   partial + ((team * row_lanes + row_lane) * deep + l) * samples);
      __syncthreads();
      for (int e = threadIdx.x; e < z.tile * deep; e += blockDim.x) {
        const int s = e / deep, k = k0 + e % deep;
        Real sum = 0;
        for (int r = 0; r < row_lanes; ++r)
          sum += partial[((s / samples * row_lanes + r) * deep + e % deep) * samples + s % samples];
        if (b0 + s < end && k < z.K)
          grad_inputs[(int64_t(b0 + s) * n.N + i) * z.K + k] = sum;
      }
      // No barrier: a second round comes only with K > threads, and then every thread reads what it wrote itself.
    }
  }

  __device__ void multiply(int i, int b, int end, const Real* grad_votes, int k, int row_lane, int row_lanes,
                           Real* part) {
    const Shape& z = seat.z;
    Real u[samples], gu[samples] = {};
    for (int s = 0; s < samples; ++s)
      u[s] = b + s < end ? votes.source.inputs[(int64_t(b + s) * n.N + i) * z.K + k] : 0;
    for (int row = row_lane; row < z.J_D; row += row_lanes) {
      const int padded = z.padded(row);
      const int64_t at = (int64_t(i) * z.J_D + row) * z.K + k;
      const Real w = votes.source.weight[at];
      Real gv[samples], gw = 0;
      load<samples>(grad_votes + (int64_t(padded % rows) * z.groups + padded / rows) * z.stride, gv);
      for (int s = 0; s < samples; ++s) {
        gu[s] += w * gv[s];
        gw += gv[s] * u[s];
      }
      grad_weight[at] += gw;
    }
    store<samples>(gu, part);
  }

  __device__ void finish(int) {}
};

template <class Shape, class Real>
using LinearGradients = std::conditional_t<Shape::fixed, RegisterGradients<Shape, Real>, ScratchGradients<Shape, Real>>;

template <class Shape, class Real, bool twice>
struct VoteGradients<RecomputedVotes<Shape, Real, twice>> : LinearGradients<Shape, Real> {
  using LinearGradients<Shape, Real>::LinearGradients;
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

// `workspace`: each block's scratch, if it is not in shared memory, and gû if it has to pass from thread to thread.
template <class Votes, class Shape = typename Votes::Shape, class Real = typename Votes::Real>
__global__ void __launch_bounds__(gradients_threads<Shape>(), 1)
    gradients(const Shape z, const Source<Real> source, const Gradients n, const Real* V, const Real* gs,
              Real* grad_source, Real* grad_weight, Real* workspace) {
  CAPS_SHARED(memory);
  Real* const shared = reinterpret_cast<Real*>(memory);
  const Scratch at(z, Votes::recompute, true, true);
  Real* const global = workspace + blockIdx.x * at.global(z, Votes::recompute, true);
  Real* const scratch = Shape::in_registers ? shared + 2 * at.piece : global;
  const Seat<Shape> seat(z);
  Votes votes(seat, source, n.B, n.N, shared, at);
  Fragments<Shape, Real> kept(seat, scratch), result(seat, scratch + at.result);
  VoteGradients<Votes> ending(seat, votes, n, grad_source, grad_weight, scratch + at.partial,
                              Shape::in_registers ? global : scratch + at.result);

  each_item<Shape>(int64_t(n.N) * n.splits, [&](int64_t item) {
    const int i = item % n.N, split = item / n.N;
    const int first = split * n.length, end = min(first + n.length, n.B);
    ending.begin(i, split);
    votes.start(i, first, 0, z.tile, (end - first + z.tile - 1) / z.tile);

    for (int b0 = first; b0 < end; b0 += z.tile) {
      const auto fetch = [&](const Seat<Shape>& seat, const Real* array, int t, int slot) {
        return read(seat, array + (int64_t(t - 1) * n.B + b0) * z.J_D, z.J_D, end - b0, slot, z.full_groups);
      };
      each_slot(z, [&](int slot) {
        kept.put(slot, votes.get(slot));
        __syncwarp();  // nothing is loaded before; else gs is, early, and gW is spilled for it
        result.put(slot, scaled(Real(1) / z.J, fetch(seat, gs, 1, slot)));
      });
      for (int t = n.T; t >= 2; --t) {
        Fragments<Shape, Real, true> held_V(seat, nullptr), held_gs(seat, nullptr);
        const Seat<Shape> here(z);  // anew, twice: else addresses are kept in registers, and gW is spilled for them
        each_slot(z, [&](int slot) {
          const auto V_x = fetch(here, V, t - 1, slot);
          put_dot(here, scratch + at.logits, slot, kept.get(slot), V_x);
          if constexpr (!holds<Shape>)
            __syncwarp();
          const auto gs_x = fetch(here, gs, t, slot);
          put_dot(here, scratch + at.agreement, slot, kept.get(slot), gs_x);
          if constexpr (holds<Shape>)
            held_V.put(slot, V_x), held_gs.put(slot, gs_x);
        });
        __syncthreads();
        couple<true>(z, scratch + at.logits, scratch + at.agreement, scratch + at.coupling, scratch + at.change);
        __syncthreads();
        const Seat<Shape> there(z);
        each_slot(z, [&](int slot) {
          auto sum = result.get(slot);
          add_scaled(there, scratch + at.coupling, slot,
                     holds<Shape> ? held_gs.get(slot) : fetch(there, gs, t, slot), sum);
          if constexpr (!holds<Shape>)
            __syncwarp();
          add_scaled(there, scratch + at.change, slot,
                     holds<Shape> ? held_V.get(slot) : fetch(there, V, t - 1, slot), sum);
          result.put(slot, sum);
        });
      }
      ending.tile(i, b0, end, result);
    }
    ending.finish(i);
  });
}

}  // namespace caps::cuda
