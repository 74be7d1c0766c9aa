// How a call is cut into blocks and launched: Plan has the launches of forward and backward, and the workspace that
// they need; with_plan chooses the instances of its kernels. Builds on route.h, gradients.h and outputs.h.
#pragma once

#include "gradients.h"
#include "outputs.h"
#include "route.h"

namespace caps::cuda {

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
    const int64_t blocks = std::min(items, multiprocessors);  // each block has its own scratch in the workspace
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
      used += ceil_div(size, 4) * 4;  // arrays begin at multiples of 16 bytes, as load() expects
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

// ---- which kernels --------------------------------------------------------------------------------------------------

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// f(plan), for the votes W u or for stored ones.
template <class Real, class F>
void with_plan(const Sizes& n, const Source<Real>& source, cudaStream_t stream, F&& f) {
  // Kernels count each of them in an int, and go on by a tile at most.
  STD_TORCH_CHECK(std::max({n.B, n.N, n.K, n.J * n.D, n.T}) < 1 << 30, "sizes are expected below 2^30");
  // gradients holds gW's 32 numbers besides: with as many samples as route it would spill four or five times as much.
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
  launch(squash_kernel<Real>, spread.blocks(), Spread::threads, 0, stream, spread, s, v);
}

template <class Real>
void run_squash_backward(int64_t vectors, int64_t D, const Real* grad, const Real* s, Real* gs, cudaStream_t stream) {
  const Spread spread(vectors, D, 1);
  launch(squash_backward_kernel<Real>, spread.blocks(), Spread::threads, 0, stream, spread, grad, s, gs);
}

}  // namespace caps::cuda
