// The fused operators on CUDA, float32 and float64. Axis letters: see caps.h.
//
// Forward, two launches per iteration:
//   route      a block owns a tile of samples and a chunk of i. It makes û_ij = W_ij u_bi anew, couples it with
//              c = softmax_j(û·V), V being the sum of the outputs so far, and leaves its share of s_bj = Σ_i c_ij û_ij
//   advance    adds the shares of all chunks in a fixed order; v = squash(s), V += v
// Backward:
//   prepare    V after each iteration, and gs^T = squash'(s^T)ᵀ ∂L/∂v
//   route      for t = T..2: p = û·gs^t, h = c (p - Σ_k c_k p_k), its share of ∂L/∂V^{t-1}_j = Σ_i h_ij û_ij
//   retreat    adds the shares to g = ∂L/∂v^{t-1}; gs^{t-1} = squash'(s^{t-1})ᵀ g
//   gradients  a block owns one i and walks through the samples:
//              gû_ij = gs^1_j / J + Σ_{t=2..T} (c^t_ij gs^t_j + h^t_ij V^{t-1}_j)
//              gu_bi = Σ_j W_ijᵀ gû_ij,  gW_ij = Σ_b gû_ij u_biᵀ
//
// Votes are never stored and nothing is added atomically: every sum has one order, so results repeat bit for bit.
// A thread holds four components d of one j for a few samples; at the models' sizes (ModelSizes) all of that stays in
// registers, else (AnySizes) in shared memory, or in a workspace where shared memory is too small.

#include "caps.h"

#ifndef CAPS_SHIM
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define CAPS_LAUNCH(kernel, grid, block, shared, stream) kernel<<<grid, block, shared, stream>>>
#define CAPS_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include <math.h>

#include <algorithm>

namespace caps {
namespace {

// ---- how a block's threads share the work --------------------------------------------------------------------------
//
// A group is `rows` components d of one j. `lanes` threads side by side take one group each, for `samples` samples;
// `teams` of them make a tile of samples; `slots` rounds cover all groups. W comes in pieces of `depth` of the K
// components, read `step` numbers at a time. `pitch` and `stride` are padded against bank conflicts.

constexpr int rows = 4;

template <class Real>
constexpr int pack = 16 / sizeof(Real);

template <class Real, int size = pack<Real>>
struct alignas(size * sizeof(Real)) Pack {
  Real at[size];
};

template <class Real, int samples_>
struct ModelSizes {
  static constexpr bool fixed = true;
  static constexpr int K = 8, J = 10, D = 16, J_D = J * D;
  static constexpr int per_j = D / rows, groups = J * per_j, lanes = groups, slots = 1;
  static constexpr int samples = samples_, teams = 4, tile = samples * teams, stride = tile + pack<Real>;
  static constexpr int depth = K, step = pack<Real> / 2, pitch = rows * depth + pack<Real>;
  static constexpr int threads = lanes * teams, max_threads = threads;
};

template <class Real>
struct AnySizes {
  static constexpr bool fixed = false;
  static constexpr int samples = pack<Real>, max_threads = 256;
  static constexpr int depth = 32 / sizeof(Real), step = 1, pitch = rows * depth + 1;
  int K, J, D, J_D, per_j, groups, lanes, slots, teams, tile, stride, threads;

  explicit AnySizes(const Sizes& n) : K(n.K), J(n.J), D(n.D), J_D(J * D) {
    per_j = (D + rows - 1) / rows;
    groups = J * per_j;
    lanes = std::min(groups, max_threads);
    slots = (groups + lanes - 1) / lanes;
    teams = std::min(max_threads / lanes, 8);
    tile = samples * teams;
    stride = tile + (teams > 1 ? pack<Real> : 0);
    threads = (lanes * teams + 31) / 32 * 32;
  }
};

// Where a block's arrays begin, counted in numbers: first the two pieces, always in shared memory, then the rest.
struct Scratch {
  int inputs_at, piece;
  int64_t kept, result, logits, agreement, coupling, change, partial, size;

  template <class Shape>
  __host__ __device__ Scratch(const Shape& z, bool recompute, bool backward, bool gradients) {
    inputs_at = (z.lanes * z.pitch + 3) / 4 * 4;
    piece = recompute ? inputs_at + z.depth * z.stride : 0;
    const int64_t parts = int64_t(z.groups) * z.stride, per_capsule = int64_t(z.J) * z.stride;
    const int64_t fragments = z.fixed ? 0 : rows * parts;
    kept = 0;                                           // û
    result = kept + fragments;                          // the share of s, or gû
    logits = result + fragments;                        // a number per group: û·V
    agreement = logits + parts;                         // and û·gs
    coupling = agreement + (backward ? parts : 0);      // c
    change = coupling + per_capsule;                    // h
    partial = change + (backward ? per_capsule : 0);    // the parts of gu
    size = partial + (gradients && recompute ? int64_t(z.threads) * (z.fixed ? z.samples : z.tile) : 0);
  }
};

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

// The place of a thread in its block. The few threads beyond the last team repeat its work and write nothing.
template <class Shape>
struct Seat {
  const Shape& z;
  int lane, team;
  bool active = true;

  __device__ explicit Seat(const Shape& z) : z(z) {
    const int tid = threadIdx.x;
    if constexpr (Shape::fixed) {  // a warp is 8 lanes of each of the 4 teams
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

// ---- two ways of obtaining a vote ----------------------------------------------------------------------------------
//
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

// ---- coupling ------------------------------------------------------------------------------------------------------

// The thread's part of Σ_d û a, for all samples of its team: a number per group.
template <class Shape, class Real>
__device__ void put_dot(const Seat<Shape>& seat, Real* parts, int slot, const Fragment<Shape, Real>& x,
                        const Fragment<Shape, Real>& a) {
  Real dot[Shape::samples] = {};
#pragma unroll
  for (int q = 0; q < rows; ++q)
#pragma unroll
    for (int s = 0; s < Shape::samples; ++s)
      dot[s] += x.at[q][s] * a.at[q][s];
  if (seat.owns(slot))
    store<Shape::samples>(dot, parts + seat.group(slot) * seat.z.stride + seat.sample());
}

template <class Shape, class Real>
__device__ void add_scaled(const Seat<Shape>& seat, const Real* scales, int slot, const Fragment<Shape, Real>& a,
                           Fragment<Shape, Real>& sum) {
  Real scale[Shape::samples] = {};
  if (Shape::fixed || seat.owns(slot))
    load<Shape::samples>(scales + seat.j(slot) * seat.z.stride + seat.sample(), scale);
#pragma unroll
  for (int q = 0; q < rows; ++q)
#pragma unroll
    for (int s = 0; s < Shape::samples; ++s)
      sum.at[q][s] += scale[s] * a.at[q][s];
}

constexpr unsigned whole_warp = 0xffffffffu;

template <class Real>
__device__ Real sum_across(Real x, int width) {
  for (int offset = width / 2; offset; offset /= 2)
    x += __shfl_xor_sync(whole_warp, x, offset);
  return x;
}

template <class Real>
__device__ Real max_across(Real x, int width) {
  for (int offset = width / 2; offset; offset /= 2)
    x = fmax(x, __shfl_xor_sync(whole_warp, x, offset));
  return x;
}

constexpr int quad = 4;  // threads that share a sample's softmax: one of them has j, j + quad, …

// Its numbers: in registers, or where they end up.
template <class Shape, class Real>
struct PerCapsule {
  Real* array;
  int stride;
  Real own[Shape::fixed ? 4 : 1];

  __device__ PerCapsule(Real* array, int stride) : array(array), stride(stride) {}
  __device__ Real& at(int j, int m) {
    if constexpr (Shape::fixed)
      return own[m];
    else
      return array[j * stride];
  }
};

template <class Shape, class F>
__device__ void each_capsule(int J, F&& f) {
  const int first = threadIdx.x % quad;
  if constexpr (Shape::fixed) {
#pragma unroll
    for (int m = 0; m * quad < Shape::J; ++m)
      if (first + m * quad < J)
        f(first + m * quad, m);
  } else {
    for (int j = first; j < J; j += quad)
      f(j, 0);
  }
}

// c = softmax_j(b), and h = c (p - Σ_k c_k p_k) if asked for.
template <bool backward, class Shape, class Real>
__device__ void couple(const Shape& z, const Real* logits, const Real* agreement, Real* coupling, Real* change) {
  for (int s0 = 0; s0 < z.tile; s0 += blockDim.x / quad) {
    const int s = s0 + threadIdx.x / quad, J = s < z.tile ? z.J : 0;
    const auto gather = [&](const Real* parts, int j) {
      Real sum = 0;
#pragma unroll
      for (int g = 0; g < z.per_j; ++g)
        sum += parts[(j * z.per_j + g) * z.stride + s];
      return sum;
    };
    PerCapsule<Shape, Real> c(coupling + s, z.stride), h(change + s, z.stride);
    Real largest = -INFINITY, sum = 0, mean = 0;
    each_capsule<Shape>(J, [&](int j, int m) { largest = fmax(largest, c.at(j, m) = gather(logits, j)); });
    largest = max_across(largest, quad);
    each_capsule<Shape>(J, [&](int j, int m) { sum += c.at(j, m) = exp(c.at(j, m) - largest); });
    const Real scale = 1 / sum_across(sum, quad);
    each_capsule<Shape>(J, [&](int j, int m) { coupling[j * z.stride + s] = c.at(j, m) *= scale; });
    if constexpr (backward) {
      each_capsule<Shape>(J, [&](int j, int m) { mean += c.at(j, m) * (h.at(j, m) = gather(agreement, j)); });
      mean = sum_across(mean, quad);
      each_capsule<Shape>(J, [&](int j, int m) { change[j * z.stride + s] = c.at(j, m) * (h.at(j, m) - mean); });
    }
  }
}

// ---- one pass over i -----------------------------------------------------------------------------------------------

enum class Pass { uniform, forward, backward };  // uniform: t = 1, where c = 1 / J

// Blocks that are to share a multiprocessor: as many as their registers allow.
template <class Shape, class Real>
constexpr int resident(bool backward) {
  return Shape::fixed && sizeof(Real) == 4 && !backward ? 3 : 2;
}

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

// ---- the gradients of inputs and weight, or of the votes -----------------------------------------------------------

struct Gradients {
  int B, N, T, splits, length;  // a split is `length` samples; each makes its own gW
};

// Adds up arrays of `count` numbers over the threads whose numbers differ in the bits first, first / 2, …, last: each
// of them is left with its own part of the sums, the higher bits choosing the larger parts.
template <int count, int first, int last, class Real>
__device__ void scatter_sums(Real* x) {
  constexpr int half = count / 2;
  const bool upper = threadIdx.x & first;
#pragma unroll
  for (int m = 0; m < half; ++m) {
    const Real other = __shfl_xor_sync(whole_warp, upper ? x[m] : x[m + half], first);
    x[m] = (upper ? x[m + half] : x[m]) + other;
  }
  if constexpr (first > last)
    scatter_sums<half, first / 2, last>(x);
}

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
    for (int half = 0; half < K; half += K / 2) {
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

// ---- between the passes: a few threads per output capsule (b, j) ---------------------------------------------------

// `width` threads side by side walk over d; `slices` of them share the chunks of a sum.
struct Spread {
  static constexpr int threads = 256;
  int width = 1, slices = 1;
  int64_t capsules;
  int D;

  Spread(int64_t capsules, int64_t D_, int64_t chunks) : capsules(capsules), D(D_) {
    while (width < D && width < 32)
      width *= 2;
    while (slices < chunks && slices * width < threads)
      slices *= 2;
  }
  int64_t blocks() const {
    const int per_block = threads / (width * slices);
    return (capsules + per_block - 1) / per_block;
  }
};

// One capsule as its threads see it: from + d for d in lane, lane + width, … < D; D = 0 for a thread without one.
struct Capsule {
  int lane, width, D, slice;
  int64_t from;

  __device__ explicit Capsule(const Spread& n) {
    const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / (n.width * n.slices);
    lane = threadIdx.x % n.width, width = n.width, slice = threadIdx.x / n.width % n.slices;
    D = index < n.capsules ? n.D : 0;
    from = index * n.D;
  }
};

template <class Real>
__device__ Real norm(const Capsule& at, const Real* s) {
  Real largest = 0, sum = 0;
  for (int d = at.lane; d < at.D; d += at.width)
    largest = fmax(largest, fabs(s[at.from + d]));
  const Real scale = norm_scale(max_across(largest, at.width));
  for (int d = at.lane; d < at.D; d += at.width)
    sum += scale * s[at.from + d] * (scale * s[at.from + d]);
  return sqrt(sum_across(sum, at.width)) / scale;
}

// gs = f (g + q e (e·g)), see caps.h.
template <class Real>
__device__ void squash_transposed(const Capsule& at, const Real* s, const Real* g, Real* gs) {
  const Real n = norm(at, s), f = squash_factor(n), q = squash_slope(n);
  const auto e = [&](int d) { return n > 0 ? s[at.from + d] / n : 0; };
  Real dot = 0;
  for (int d = at.lane; d < at.D; d += at.width)
    dot += e(d) * g[at.from + d];
  dot = sum_across(dot, at.width);
  if (at.slice == 0)
    for (int d = at.lane; d < at.D; d += at.width)
      gs[at.from + d] = f * (g[at.from + d] + q * e(d) * dot);
}

// The sum of all chunks' shares, added to `total` or put there.
template <class Real>
__device__ void add_shares(const Capsule& at, const Spread& n, const Real* shares, int64_t chunks, bool add,
                           Real* total) {
  CAPS_SHARED(memory);
  Real* const parts = reinterpret_cast<Real*>(memory);
  const int own = threadIdx.x;
  for (int d0 = 0; d0 < n.D; d0 += n.width) {
    const int d = d0 + at.lane;
    Real sum = 0;
    if (d < at.D)
#pragma unroll 8
      for (int64_t c = at.slice; c < chunks; c += n.slices)
        sum += shares[c * n.capsules * n.D + at.from + d];
    parts[own] = sum;
    __syncthreads();
    if (at.slice == 0 && d < at.D) {
      sum = add ? total[at.from + d] : 0;
      for (int slice = 0; slice < n.slices; ++slice)
        sum += parts[own + slice * n.width];
      total[at.from + d] = sum;
    }
    __syncthreads();
  }
}

template <class Real>
__global__ void advance(const Spread n, const Real* shares, int64_t chunks, bool first, Real* s, Real* v, Real* V) {
  const Capsule at(n);
  add_shares(at, n, shares, chunks, false, s);
  const Real f = squash_factor(norm(at, s));
  if (at.slice == 0)
    for (int d = at.lane; d < at.D; d += at.width) {
      v[at.from + d] = f * s[at.from + d];
      V[at.from + d] = first ? v[at.from + d] : V[at.from + d] + v[at.from + d];
    }
}

template <class Real>
__global__ void retreat(const Spread n, const Real* shares, int64_t chunks, bool first, const Real* s, Real* g,
                        Real* gs) {
  const Capsule at(n);
  add_shares(at, n, shares, chunks, !first, g);
  squash_transposed(at, s, g, gs);
}

// V [T - 1, B, J, D] and gs^T.
template <class Real>
__global__ void prepare(const Spread n, int64_t T, const Real* sums, const Real* grad, Real* V, Real* gs) {
  const Capsule at(n);
  const int64_t size = n.capsules * n.D;
  for (int64_t t = 1; t < T; ++t, sums += size, V += size, gs += size) {
    const Real f = squash_factor(norm(at, sums));
    for (int d = at.lane; d < at.D; d += at.width)
      V[at.from + d] = f * sums[at.from + d] + (t > 1 ? V[at.from + d - size] : 0);
  }
  squash_transposed(at, sums, grad, gs);
}

template <class Real>
__global__ void squash_forward(const Spread n, const Real* s, Real* v) {
  const Capsule at(n);
  const Real f = squash_factor(norm(at, s));
  for (int d = at.lane; d < at.D; d += at.width)
    v[at.from + d] = f * s[at.from + d];
}

template <class Real>
__global__ void squash_backward(const Spread n, const Real* g, const Real* s, Real* gs) {
  squash_transposed(Capsule(n), s, g, gs);
}

template <class Real>
__global__ void add_splits(const Real* parts, int64_t splits, int64_t size, Real* sum) {
  const int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e < size) {
    Real total = 0;
    for (int64_t split = 0; split < splits; ++split)
      total += parts[split * size + e];
    sum[e] = total;
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "caps: CUDA: ", cudaGetErrorString(error)); }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
  if (blocks == 0)
    return;
  if (shared > 48 << 10)  // beyond this a kernel has to ask
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared)));
  CAPS_LAUNCH(kernel, unsigned(blocks), unsigned(threads), size_t(shared), stream)(arguments...);
  check(cudaGetLastError());
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How one call is cut into blocks, and the workspace that it needs, counted in numbers.
template <class RouteVotes, class GradientVotes>
class Plan {
  using Real = typename RouteVotes::Real;
  const Sizes n;
  const typename RouteVotes::Shape route_shape;
  const typename GradientVotes::Shape gradients_shape;
  const Source<Real> source;
  const cudaStream_t stream;
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t shared_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t outputs = n.B * n.J * n.D, weights = n.N * n.J * n.D * n.K;
  const Route forward_passes = cut_route(false), backward_passes = cut_route(true);
  const Gradients last = cut_gradients();

  // All blocks at once on the multiprocessors if they are enough; a chunk of fewer than 8 capsules would not pay.
  Route cut_route(bool backward) const {
    using Shape = typename RouteVotes::Shape;
    const int64_t room = resident<Shape, Real>(backward) * multiprocessors, tiles = ceil_div(n.B, route_shape.tile);
    const int64_t most = tiles ? std::max<int64_t>(1, room / tiles) : 1;
    const int64_t length = std::max<int64_t>(1, ceil_div(n.N, std::max<int64_t>(1, std::min(most, ceil_div(n.N, 8)))));
    return {int(n.B), int(n.N), int(tiles), int(ceil_div(n.N, length)), int(length)};
  }
  // One split unless there are few capsules; the gradients of votes have no sum over samples, so a split is a tile.
  Gradients cut_gradients() const {
    const int64_t tiles = ceil_div(n.B, gradients_shape.tile);
    const int64_t most = n.N && GradientVotes::recompute ? std::max<int64_t>(1, 3 * multiprocessors / n.N) : tiles;
    const int64_t length = tiles ? ceil_div(tiles, std::min(most, tiles)) * gradients_shape.tile : 1;
    return {int(n.B), int(n.N), int(n.T), int(tiles ? ceil_div(n.B, length) : 1), int(length)};
  }

  struct Cost {
    int64_t blocks, shared, scratch;  // shared memory in bytes; scratch: what does not fit there
  };

  template <class Shape>
  Cost cost(const Shape& shape, bool backward, bool gradients, int64_t items) const {
    const Scratch at(shape, RouteVotes::recompute, backward, gradients);
    const int64_t pieces = 2 * at.piece * int64_t(sizeof(Real)), all = pieces + at.size * int64_t(sizeof(Real));
    if (all <= shared_limit)
      return {std::min<int64_t>(items, 1 << 30), all, 0};
    const int64_t blocks = std::min(items, multiprocessors);
    return {blocks, pieces, blocks * at.size};
  }
  Cost route_cost(bool backward) const {
    const Route& passes = backward ? backward_passes : forward_passes;
    return cost(route_shape, backward, false, int64_t(passes.tiles) * passes.chunks);
  }
  Cost gradients_cost() const { return cost(gradients_shape, true, true, n.N * last.splits); }

  // Cuts a workspace into arrays; with none it counts.
  struct Cutter {
    Real* workspace;
    int64_t used = 0;
    Real* operator()(int64_t size) {
      const int64_t at = used;
      used += ceil_div(size, 4) * 4;
      return workspace && size ? workspace + at : nullptr;
    }
  };
  struct ForwardArrays {
    Real *V, *shares, *scratch;
  };
  struct BackwardArrays {
    Real *V, *gs, *g, *shares, *route_scratch, *gradients_scratch, *grad_weights;
  };
  ForwardArrays cut_forward(Cutter& take) const {
    return {take(outputs), take(forward_passes.chunks * outputs), take(route_cost(false).scratch)};
  }
  BackwardArrays cut_backward(Cutter& take) const {
    return {take((n.T - 1) * outputs),
            take(n.T * outputs),
            take(outputs),
            take(backward_passes.chunks * outputs),
            take(route_cost(true).scratch),
            take(gradients_cost().scratch),
            take(last.splits > 1 ? last.splits * weights : 0)};
  }

  template <Pass pass>
  void run_route(const Real* V, const Real* gs, Real* shares, Real* scratch) const {
    const Cost c = route_cost(pass == Pass::backward);
    launch(route<pass, RouteVotes>, c.blocks, route_shape.threads, c.shared, stream, route_shape, source,
           pass == Pass::backward ? backward_passes : forward_passes, V, gs, shares, scratch);
  }

 public:
  Plan(const Sizes& n, Source<Real> source, cudaStream_t stream, const typename RouteVotes::Shape& route_shape,
       const typename GradientVotes::Shape& gradients_shape)
      : n(n), route_shape(route_shape), gradients_shape(gradients_shape), source(source), stream(stream) {}

  int64_t forward_workspace() const {
    Cutter take{nullptr};
    cut_forward(take);
    return take.used;
  }
  int64_t backward_workspace() const {
    Cutter take{nullptr};
    cut_backward(take);
    return take.used;
  }

  void forward(Real* v, Real* sums, Real* workspace) const {
    Cutter take{workspace};
    const ForwardArrays a = cut_forward(take);
    const Spread spread(n.B * n.J, n.D, forward_passes.chunks);
    for (int64_t t = 1; t <= n.T; ++t) {
      if (t == 1)
        run_route<Pass::uniform>(nullptr, nullptr, a.shares, a.scratch);
      else
        run_route<Pass::forward>(a.V, nullptr, a.shares, a.scratch);
      launch(advance<Real>, spread.blocks(), Spread::threads, Spread::threads * sizeof(Real), stream, spread, a.shares,
             forward_passes.chunks, t == 1, sums + (t - 1) * outputs, v, a.V);
    }
  }

  void backward(const Real* grad, const Real* sums, Real* grad_source, Real* grad_weight, Real* workspace) const {
    Cutter take{workspace};
    const BackwardArrays a = cut_backward(take);
    const Spread alone(n.B * n.J, n.D, 1), spread(n.B * n.J, n.D, backward_passes.chunks);
    launch(prepare<Real>, alone.blocks(), Spread::threads, 0, stream, alone, n.T, sums, grad, a.V, a.gs);
    for (int64_t t = n.T; t >= 2; --t) {
      run_route<Pass::backward>(a.V + (t - 2) * outputs, a.gs + (t - 1) * outputs, a.shares, a.route_scratch);
      launch(retreat<Real>, spread.blocks(), Spread::threads, Spread::threads * sizeof(Real), stream, spread, a.shares,
             backward_passes.chunks, t == n.T, sums + (t - 2) * outputs, a.g, a.gs + (t - 2) * outputs);
    }
    const Cost c = gradients_cost();
    launch(gradients<GradientVotes>, c.blocks, gradients_shape.threads, c.shared, stream, gradients_shape, source, last,
           a.V, a.gs, grad_source, a.grad_weights ? a.grad_weights : grad_weight, a.gradients_scratch);
    if (a.grad_weights)
      launch(add_splits<Real>, ceil_div(weights, Spread::threads), Spread::threads, 0, stream, a.grad_weights,
             last.splits, weights, grad_weight);
  }
};

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// f(plan), for the votes W u or for stored ones.
template <class Real, class F>
void with_plan(const Sizes& n, const Source<Real>& source, cudaStream_t stream, F&& f) {
  STD_TORCH_CHECK(std::max({n.B, n.N, n.K, n.J * n.D, n.T}) < 1 << 30, "sizes are expected below 2^30");
  using RouteModel = ModelSizes<Real, 2 * pack<Real>>;
  using GradientsModel = ModelSizes<Real, pack<Real>>;
  using Any = AnySizes<Real>;
  const bool model = n.J == RouteModel::J && n.D == RouteModel::D;
  if (n.K == 0) {
    if (model && aligned(source.votes))
      f(Plan<StoredVotes<RouteModel, Real>, StoredVotes<GradientsModel, Real>>(n, source, stream, {}, {}));
    else
      f(Plan<StoredVotes<Any, Real>, StoredVotes<Any, Real>>(n, source, stream, Any(n), Any(n)));
  } else {
    if (model && n.K == RouteModel::K && aligned(source.weight))
      f(Plan<RecomputedVotes<RouteModel, Real>, RecomputedVotes<GradientsModel, Real>>(n, source, stream, {}, {}));
    else
      f(Plan<RecomputedVotes<Any, Real>, RecomputedVotes<Any, Real>>(n, source, stream, Any(n), Any(n)));
  }
}

template <class Real>
void run_squash(int64_t vectors, int64_t D, const Real* s, Real* v, cudaStream_t stream) {
  const Spread spread(vectors, D, 1);
  launch(squash_forward<Real>, spread.blocks(), Spread::threads, 0, stream, spread, s, v);
}

template <class Real>
void run_squash_backward(int64_t vectors, int64_t D, const Real* grad, const Real* s, Real* gs, cudaStream_t stream) {
  const Spread spread(vectors, D, 1);
  launch(squash_backward<Real>, spread.blocks(), Spread::threads, 0, stream, spread, grad, s, gs);
}

}  // namespace

// ---- registration --------------------------------------------------------------------------------------------------

#ifndef CAPS_SHIM
namespace cuda {

// The current device and stream while an operator runs.
struct Context {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Context(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

Tensor squash(const Tensor& s_) {
  check_squash(s_);
  const Context context(s_);
  const Tensor s = torch::stable::contiguous(s_), v = torch::stable::empty_like(s);
  const int64_t D = s.size(s.dim() - 1), vectors = D ? s.numel() / D : 0;
  dispatch(s, [&](auto number) {
    using Real = decltype(number);
    run_squash(vectors, D, data<Real>(s), data<Real>(v), context.stream);
  });
  return v;
}

Tensor squash_backward(const Tensor& grad_, const Tensor& s_) {
  check_squash_backward(grad_, s_);
  const Context context(s_);
  const Tensor grad = torch::stable::contiguous(grad_), s = torch::stable::contiguous(s_);
  const Tensor gs = torch::stable::empty_like(s);
  const int64_t D = s.size(s.dim() - 1), vectors = D ? s.numel() / D : 0;
  dispatch(s, [&](auto number) {
    using Real = decltype(number);
    run_squash_backward(vectors, D, data<Real>(grad), data<Real>(s), data<Real>(gs), context.stream);
  });
  return gs;
}

template <class Real>
void run_forward(const Sizes& n, const Source<Real>& source, const Tensor& v, const Tensor& sums, cudaStream_t stream) {
  with_plan(n, source, stream, [&](const auto& plan) {
    const Tensor workspace = empty(v, {plan.forward_workspace()});
    plan.forward(data<Real>(v), data<Real>(sums), data<Real>(workspace));
  });
}

template <class Real>
void run_backward(const Sizes& n, const Source<Real>& source, const Tensor& grad, const Tensor& sums, Real* grad_source,
                  Real* grad_weight, cudaStream_t stream) {
  with_plan(n, source, stream, [&](const auto& plan) {
    const Tensor workspace = empty(grad, {plan.backward_workspace()});
    plan.backward(data<Real>(grad), data<Real>(sums), grad_source, grad_weight, data<Real>(workspace));
  });
}

std::tuple<Tensor, Tensor> capsule_linear(const Tensor& inputs_, const Tensor& weight_, int64_t iterations) {
  const Sizes n = check_capsule_linear(inputs_, weight_, iterations);
  const Context context(inputs_);
  const Tensor inputs = torch::stable::contiguous(inputs_), weight = torch::stable::contiguous(weight_);
  const Tensor v = empty(inputs, {n.B, n.J, n.D}), sums = empty(inputs, {n.T, n.B, n.J, n.D});
  dispatch(inputs, [&](auto number) {
    using Real = decltype(number);
    run_forward<Real>(n, {nullptr, data<Real>(inputs), data<Real>(weight)}, v, sums, context.stream);
  });
  return {v, sums};
}

std::tuple<Tensor, Tensor> capsule_linear_backward(const Tensor& grad_, const Tensor& inputs_, const Tensor& weight_,
                                                   const Tensor& sums_) {
  const Sizes n = check_capsule_linear_backward(grad_, inputs_, weight_, sums_);
  const Context context(inputs_);
  const Tensor grad = torch::stable::contiguous(grad_), sums = torch::stable::contiguous(sums_);
  const Tensor inputs = torch::stable::contiguous(inputs_), weight = torch::stable::contiguous(weight_);
  const Tensor grad_inputs = torch::stable::empty_like(inputs), grad_weight = torch::stable::empty_like(weight);
  dispatch(inputs, [&](auto number) {
    using Real = decltype(number);
    run_backward<Real>(n, {nullptr, data<Real>(inputs), data<Real>(weight)}, grad, sums, data<Real>(grad_inputs),
                       data<Real>(grad_weight), context.stream);
  });
  return {grad_inputs, grad_weight};
}

std::tuple<Tensor, Tensor> routing(const Tensor& votes_, int64_t iterations) {
  const Sizes n = check_routing(votes_, iterations);
  const Context context(votes_);
  const Tensor votes = torch::stable::contiguous(votes_);
  const Tensor v = empty(votes, {n.B, n.J, n.D}), sums = empty(votes, {n.T, n.B, n.J, n.D});
  dispatch(votes, [&](auto number) {
    using Real = decltype(number);
    run_forward<Real>(n, {data<Real>(votes), nullptr, nullptr}, v, sums, context.stream);
  });
  return {v, sums};
}

Tensor routing_backward(const Tensor& grad_, const Tensor& votes_, const Tensor& sums_) {
  const Sizes n = check_routing_backward(grad_, votes_, sums_);
  const Context context(votes_);
  const Tensor grad = torch::stable::contiguous(grad_), votes = torch::stable::contiguous(votes_);
  const Tensor sums = torch::stable::contiguous(sums_), grad_votes = torch::stable::empty_like(votes);
  dispatch(votes, [&](auto number) {
    using Real = decltype(number);
    run_backward<Real>(n, {data<Real>(votes), nullptr, nullptr}, grad, sums, data<Real>(grad_votes), nullptr,
                       context.stream);
  });
  return grad_votes;
}

}  // namespace cuda

STABLE_TORCH_LIBRARY_IMPL(caps, CUDA, m) {
  m.impl("squash", TORCH_BOX(&cuda::squash));
  m.impl("squash_backward", TORCH_BOX(&cuda::squash_backward));
  m.impl("capsule_linear", TORCH_BOX(&cuda::capsule_linear));
  m.impl("capsule_linear_backward", TORCH_BOX(&cuda::capsule_linear_backward));
  m.impl("routing", TORCH_BOX(&cuda::routing));
  m.impl("routing_backward", TORCH_BOX(&cuda::routing_backward));
}
#endif

}  // namespace caps
