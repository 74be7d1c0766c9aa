// How many threads, samples and numbers a block has: for the models' K and D mostly constants, else from the arguments;
// and where its arrays lie in shared memory.
#pragma once

#include "runtime.h"

#include <algorithm>

namespace caps::cuda {

// ---- how a block's threads share the work ---------------------------------------------------------------------------
//
// A group is `rows` components d of one j. `lanes` threads side by side take one group each, for `samples` samples;
// `teams` of them make a tile of samples; `slots` rounds cover all groups. W comes in pieces of `depth` of the K
// components, of which a thread reads `step` at a time. `pitch` and `stride` are padded against bank conflicts.
// `held_slots` and `own`: of how many slots, and output capsules, a thread has numbers in registers.

constexpr int rows = 4;

// Numbers in 16 bytes, which a thread loads, stores or copies at once.
template <class Real>
constexpr int pack = 16 / sizeof(Real);

template <class Real, int size = pack<Real>>
struct alignas(size * sizeof(Real)) Pack {
  Real at[size];
};

constexpr int power_of_two(int least) { return least > 1 ? 2 * power_of_two((least + 1) / 2) : 1; }

// K = 8 and D = 16, and J up to most_J. A warp is 32 / teams lanes of each team. With four teams it reads 8 groups'
// rows of W and 4 teams' samples of u, 64 bytes of shared memory each, where 32 lanes of one team would read 256 and
// 16; and all samples of a tile meet in a warp, which adds their parts of gW by shuffles.
template <class Real, int most_J, int samples_, int slots_, int teams_, int depth_>
struct ModelSizes {
  static constexpr bool fixed = true, in_registers = true, full_groups = true;
  static constexpr int K = 8, D = 16, per_j = D / rows, parts_per_j = 1;
  static constexpr int samples = samples_, slots = slots_, held_slots = slots, teams = teams_, depth = depth_;
  static constexpr int warp_lanes = 32 / teams;
  static constexpr int max_threads = round_up(ceil_div(most_J * per_j, slots), warp_lanes) * teams;
  static constexpr int tile = samples * teams, stride = tile + (teams > 1 ? pack<Real> : 0);
  static constexpr int step = teams == 4 ? pack<Real> / 2 : pack<Real>, pitch = rows * depth + pack<Real>;
  static constexpr bool buffers_hold_weight = slots == 1;         // the whole W_i, in two pieces at most
  static constexpr bool ends_in_pieces = slots > 1 || depth < K;  // gradients: else W_i is still there at the end
  static constexpr int sharers = power_of_two(ceil_div(most_J, 4));
  static constexpr int own = ceil_div(most_J, sharers);  // output capsules of each in a sample's softmax: 4 at most
  int J, J_D, groups, lanes, threads;

  explicit ModelSizes(const Sizes& n) : J(n.J), J_D(J * D), groups(J * per_j) {
    lanes = round_up(ceil_div(groups, slots), warp_lanes);
    threads = lanes * teams;
  }
  CAPS_HD int row(int padded) const { return padded < J_D ? padded : J_D - 1; }
};

// Any sizes. in_registers: one slot, and a thread's fragments are in registers; else all of a block's scratch is in
// global memory.
template <bool in_registers>
struct AnySlots {
  int slots;
  void cover(int groups, int lanes) { slots = ceil_div(groups, lanes); }
};
template <>
struct AnySlots<true> {
  static constexpr int slots = 1;
  void cover(int, int) {}
};

template <class Real, bool in_registers_>
struct AnySizes : AnySlots<in_registers_> {
  static constexpr bool fixed = false, in_registers = in_registers_;
  static constexpr bool buffers_hold_weight = false, ends_in_pieces = false;
  static constexpr int samples = pack<Real>, max_threads = 256, max_lanes = 224;
  static constexpr int depth = pack<Real>, step = pack<Real>, pitch = rows * depth + pack<Real>;
  static constexpr int held_slots = 1, sharers = 4, own = 1;
  int K, J, D, J_D, per_j, parts_per_j, groups, lanes, teams, tile, stride, threads;
  bool full_groups;  // D is a multiple of `rows`

  explicit AnySizes(const Sizes& n) : K(n.K), J(n.J), D(n.D), J_D(J * D) {
    per_j = parts_per_j = ceil_div(D, rows);
    groups = J * per_j;
    full_groups = D % rows == 0;
    lanes = std::min(groups, max_lanes);
    this->cover(groups, lanes);
    teams = std::min(max_threads / lanes, 8);
    tile = samples * teams;
    stride = tile + (teams > 1 ? pack<Real> : 0);
    threads = round_up(lanes * teams, 32);  // shuffles are of whole warps
  }
  // Rows number `padded` of all groups, and (j, d) of W_i. Where there is no such row of W_i, another.
  CAPS_HD int row(int padded) const {
    const int group = padded / rows;
    const int row = full_groups ? padded : group / per_j * D + group % per_j * rows + padded % rows;
    return row < J_D ? row : J_D - 1;
  }
  CAPS_HD int padded(int row) const {
    return full_groups ? row : (row / D * per_j + row % D / rows) * rows + row % D % rows;
  }
};

// ---- scratch --------------------------------------------------------------------------------------------------------

// Where a block's arrays begin, counted in numbers: first the two pieces, always in shared memory, then the rest.
struct Scratch {
  int inputs_at, piece;
  int64_t result, logits, agreement, coupling, change, partial, size;

  template <class Shape>
  __host__ __device__ Scratch(const Shape& z, bool recompute, bool backward, bool gradients) {
    inputs_at = z.lanes * z.pitch;  // multiples of 16 bytes, as load() expects
    piece = recompute ? inputs_at + z.depth * z.stride : 0;
    const int64_t per_capsule = int64_t(z.J) * z.stride, parts = z.parts_per_j * per_capsule;
    const int64_t fragments = z.in_registers ? 0 : int64_t(rows) * z.groups * z.stride;
    result = fragments;                                 // û comes first; then the share of s, or gû
    logits = result + fragments;                        // û·V, in parts_per_j parts
    agreement = logits + parts;                         // and û·gs
    coupling = agreement + (backward ? parts : 0);      // c, unless registers have it for h alone
    change = coupling + (z.fixed && backward && !gradients ? 0 : per_capsule);  // h
    partial = change + (backward ? per_capsule : 0);    // the parts of gu
    size = partial + (gradients && recompute ? int64_t(z.fixed ? z.threads / 32 * z.K : z.threads) * z.tile : 0);
  }

  // What lies in shared memory, in bytes.
  template <class Real, class Shape>
  int64_t shared(const Shape& z) const {
    return (2 * piece + (z.in_registers ? size : 0)) * int64_t(sizeof(Real));
  }
  // What each block has in global memory instead; where gû has to pass from thread to thread, it does so there.
  template <class Shape>
  CAPS_HD int64_t global(const Shape& z, bool recompute, bool gradients) const {
    if (!z.in_registers)
      return size;
    return !z.fixed && gradients && recompute ? int64_t(rows) * z.groups * z.stride : 0;
  }
};

}  // namespace caps::cuda
