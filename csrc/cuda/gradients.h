// The kernel `gradients`, the last pass: gû of every vote, and from it the gradients of inputs and weight, or of the
// votes. Builds on votes.h and coupling.h.
#pragma once

#include "coupling.h"
#include "votes.h"

namespace caps::cuda {

struct Gradients {
  int B, N, T, splits, length;  // a split is `length` samples; each makes its own gW
};

// ---- what becomes of gû ---------------------------------------------------------------------------------------------

// What becomes of gû_ij for a capsule i, tile of samples by tile of samples. Stored votes: it is the result.
template <class Votes>
struct VoteGradients;

template <class Shape, class Real>
struct VoteGradients<StoredVotes<Shape, Real>> {
  const Seat<Shape>& seat;
  const Gradients& n;
  Real* const grad_votes;

  __device__ VoteGradients(const Seat<Shape>& seat, const StoredVotes<Shape, Real>&, const Gradients& n,
                           Real* grad_votes, Real*, Real*)
      : seat(seat), n(n), grad_votes(grad_votes) {}
  __device__ void begin(int, int) {}
  __device__ void tile(int i, int b0, int end, const Fragments<Shape, Real>& result) {
    const int J_D = seat.z.J_D;
    for (int slot = 0; slot < seat.z.slots; ++slot)
      if (seat.active)
        write(seat, grad_votes + int64_t(i) * J_D, int64_t(n.N) * J_D, end, b0, slot, result.get(slot));
  }
  __device__ void finish(int) {}
};

// W u: gu_bi = Σ_j W_ijᵀ gû_ij, and the sum of gW_ij = Σ_b gû_ij u_biᵀ. At the models' sizes from registers: a warp's
// 8 lanes are left with parts of gu, and its 4 teams with a row of gW each.
template <class Real, int samples>
struct VoteGradients<RecomputedVotes<ModelSizes<Real, samples>, Real>> {
  using Shape = ModelSizes<Real, samples>;
  static constexpr int K = Shape::K, tile_size = Shape::tile * K;
  static_assert(K == 8 && rows == Shape::teams);
  const Seat<Shape>& seat;
  const RecomputedVotes<Shape, Real>& votes;
  const Gradients& n;
  Real *const grad_inputs, *const grad_weights, *const partial;
  Real* grad_weight = nullptr;
  Real gw[rows * K] = {};

  __device__ void begin(int, int split) {
    grad_weight = grad_weights + int64_t(split) * n.N * Shape::J_D * K;
#pragma unroll
    for (Real& x : gw)
      x = 0;
  }

  __device__ void tile(int i, int b0, int end, const Fragments<Shape, Real>& result) {
    const auto gv = result.get(0);
    Real* const part = partial + threadIdx.x / 32 * tile_size + seat.sample();
#pragma unroll
    for (int half = 0; half < K; half += K / 2) {  // half of gu at a time: half as many registers
      Real gu[K / 2 * samples] = {};
#pragma unroll
      for (int k = 0; k < K / 2; k += Shape::step) {
        Real w[rows][Shape::step];
#pragma unroll
        for (int q = 0; q < rows; ++q)
          load<Shape::step>(votes.weight + q * K + half + k, w[q]);
#pragma unroll
        for (int l = 0; l < Shape::step; ++l) {
          Real u[samples];
          load<samples>(votes.inputs + (half + k + l) * Shape::stride, u);
#pragma unroll
          for (int q = 0; q < rows; ++q)
#pragma unroll
            for (int s = 0; s < samples; ++s) {
              gu[(k + l) * samples + s] += w[q][l] * gv.at[q][s];
              gw[q * K + half + k + l] += gv.at[q][s] * u[s];
            }
        }
      }
      scatter_sums<K / 2 * samples, 4, 1>(gu);
      const int own = threadIdx.x % 8 * (samples / 2);  // of the [K / 2, samples]
#pragma unroll
      for (int s = 0; s < samples / 2; ++s)
        part[(half + own / samples) * Shape::tile + own % samples + s] = gu[s];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < tile_size; e += blockDim.x) {
      const int s = e / K;
      Real sum = 0;
#pragma unroll
      for (int w = 0; w < Shape::threads / 32; ++w)
        sum += partial[w * tile_size + e % K * Shape::tile + s];
      if (b0 + s < end)
        grad_inputs[(int64_t(b0 + s) * n.N + i) * K + e % K] = sum;
    }
  }

  __device__ void finish(int i) {
    scatter_sums<rows * K, 16, 8>(gw);
    store<K>(gw, grad_weight + (int64_t(i) * Shape::J_D + seat.lane * rows + seat.team) * K);
  }
};

// Else from gû in scratch: a thread takes one k and every so-manieth row (j, d) of W_i.
template <class Real>
struct VoteGradients<RecomputedVotes<AnySizes<Real>, Real>> {
  using Shape = AnySizes<Real>;
  static constexpr int samples = Shape::samples;
  const Seat<Shape>& seat;
  const RecomputedVotes<Shape, Real>& votes;
  const Gradients& n;
  Real *const grad_inputs, *const grad_weights, *const partial;
  Real* grad_weight = nullptr;

  __device__ void begin(int i, int split) {
    const int64_t size = int64_t(seat.z.J_D) * seat.z.K;
    grad_weight = grad_weights + split * n.N * size;
    for (int64_t e = threadIdx.x; e < size; e += blockDim.x)
      grad_weight[i * size + e] = 0;
  }

  __device__ void tile(int i, int b0, int end, const Fragments<Shape, Real>& result) {
    const Shape& z = seat.z;
    const int deep = z.K < z.threads ? z.K : z.threads, row_lanes = z.threads / deep;
    const int l = threadIdx.x % deep, row_lane = threadIdx.x / deep;
    __syncthreads();
    for (int k0 = 0; k0 < z.K; k0 += deep) {
      if (k0 + l < z.K && row_lane < row_lanes)
        for (int team = 0; team < z.teams; ++team)
          multiply(i, b0 + team * samples, end, result.array + team * samples, k0 + l, row_lane, row_lanes,
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
      const int group = row / z.D * z.per_j + row % z.D / rows, q = row % z.D % rows;
      const int64_t at = (int64_t(i) * z.J_D + row) * z.K + k;
      const Real w = votes.source.weight[at];
      Real gv[samples], gw = 0;
      load<samples>(grad_votes + int64_t(q * z.groups + group) * z.stride, gv);
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

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class Votes, class Shape = typename Votes::Shape, class Real = typename Votes::Real>
__global__ void __launch_bounds__(Shape::max_threads, resident<Shape, Real>(false))
    gradients(const Shape z, const Source<Real> source, const Gradients n, const Real* V, const Real* gs,
              Real* grad_source, Real* grad_weight, Real* workspace) {
  CAPS_SHARED(memory);
  Real* const shared = reinterpret_cast<Real*>(memory);
  const Scratch at(z, Votes::recompute, true, true);
  Real* const scratch = workspace ? workspace + blockIdx.x * at.size : shared + 2 * at.piece;
  const Seat<Shape> seat(z);
  Votes votes(seat, source, n.B, n.N, shared, at);
  Fragments<Shape, Real> kept(seat, scratch + at.kept), result(seat, scratch + at.result);
  Fragments<Shape, Real, true> kept_V(seat, nullptr), kept_gs(seat, nullptr);
  VoteGradients<Votes> ending{seat, votes, n, grad_source, grad_weight, scratch + at.partial};

  for (int64_t item = blockIdx.x; item < int64_t(n.N) * n.splits; item += gridDim.x) {
    const int i = item % n.N, split = item / n.N;
    const int first = split * n.length, end = min(first + n.length, n.B);
    ending.begin(i, split);
    votes.start(i, first, 0, z.tile, (end - first + z.tile - 1) / z.tile);

    for (int b0 = first; b0 < end; b0 += z.tile) {
      const auto fetch = [&](const Real* array, int t, int slot) {
        return read(seat, array + int64_t(t - 1) * n.B * z.J_D, z.J_D, end, b0, slot);
      };
      for (int slot = 0; slot < z.slots; ++slot) {
        kept.put(slot, votes.get(slot));
        auto sum = fetch(gs, 1, slot);
#pragma unroll
        for (int q = 0; q < rows; ++q)
#pragma unroll
          for (int s = 0; s < Shape::samples; ++s)
            sum.at[q][s] *= Real(1) / z.J;
        result.put(slot, sum);
      }
      for (int t = n.T; t >= 2; --t) {
        for (int slot = 0; slot < z.slots; ++slot) {
          kept_V.put(slot, fetch(V, t - 1, slot));
          kept_gs.put(slot, fetch(gs, t, slot));
          put_dot(seat, scratch + at.logits, slot, kept.get(slot), kept_V.get(slot));
          put_dot(seat, scratch + at.agreement, slot, kept.get(slot), kept_gs.get(slot));
        }
        __syncthreads();
        couple<true>(z, scratch + at.logits, scratch + at.agreement, scratch + at.coupling, scratch + at.change);
        __syncthreads();
        for (int slot = 0; slot < z.slots; ++slot) {
          auto sum = result.get(slot);
          add_scaled(seat, scratch + at.coupling, slot, Shape::fixed ? kept_gs.get(slot) : fetch(gs, t, slot), sum);
          add_scaled(seat, scratch + at.change, slot, Shape::fixed ? kept_V.get(slot) : fetch(V, t - 1, slot), sum);
          result.put(slot, sum);
        }
      }
      ending.tile(i, b0, end, result);
    }
    ending.finish(i);
  }
}

}  // namespace caps::cuda
