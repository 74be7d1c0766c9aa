// How a call is cut into blocks and launched: Plan has the launches of forward and backward, and the workspace that
// they need; with_plan chooses the instances of its kernels. Builds on route.h, gradients.h and outputs.h.
#pragma once

#include "gradients.h"
#include "outputs.h"
#include "route.h"

#include <cmath>
#include <type_traits>

namespace caps::cuda {

// Of `count` steps that follow each other in all blocks together, how many one block takes. What comes once a block
// (its share is written and read again) costs about as much as a step; what is lost at the end, when some
// multiprocessors wait for others, about half a block: the cost per step of a GPU of some 132 multiprocessors is least
// near this root. From the sizes alone, so that every GPU adds the same numbers in the same order.
inline int64_t steps_per_block(int64_t count) { return std::max<int64_t>(1, int64_t(std::sqrt(double(count) / 64))); }

// How one call is cut into blocks, and the workspace that it needs, counted in numbers.
template <class RouteVotes, class GradientVotes>
class Plan {
  using Real = typename RouteVotes::Real;
  const Sizes n;
  const typename RouteVotes::Shape route_shape;
  const typename GradientVotes::Shape gradients_shape;
  const Source<Real> source;
  const cudaStream_t stream;
  const int64_t outputs = n.B * n.J * n.D, weights = RouteVotes::recompute ? n.N * n.J * n.D * n.K : 0;
  const Route passes = cut_route();
  const Gradients last = cut_gradients();

  Route cut_route() const {
    const int64_t tiles = ceil_div(n.B, route_shape.tile), length = std::min(n.N, steps_per_block(tiles * n.N));
    return {int(n.B), int(n.N), int(tiles), int(ceil_div(n.N, length)), int(length)};
  }
  // The gradients of votes have no sum over samples, so a split is a tile.
  Gradients cut_gradients() const {
    const int64_t tiles = ceil_div(n.B, gradients_shape.tile);
    const int64_t length = GradientVotes::recompute ? std::min(tiles, steps_per_block(tiles * n.N)) : 1;
    return {int(n.B), int(n.N), int(n.T), int(ceil_div(tiles, length)), int(length * gradients_shape.tile)};
  }

  struct Cost {
    int64_t blocks, shared, scratch;  // shared memory in bytes; scratch: in the workspace, of all blocks
  };
  template <class Shape>
  Cost cost(const Shape& shape, bool backward, bool gradients, int64_t items) const {
    const Scratch at(shape, RouteVotes::recompute, backward, gradients);
    const int64_t global = at.global(shape, RouteVotes::recompute, gradients);
    const int64_t blocks = std::min<int64_t>(items, global ? 256 : 1 << 30);  // each has scratch of its own
    return {blocks, at.template shared<Real>(shape), blocks * global};
  }
  Cost route_cost(bool backward) const {
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
    return {take(outputs), take(passes.chunks * outputs), take(route_cost(false).scratch)};
  }
  BackwardArrays cut_backward(Cutter& take) const {
    return {take((n.T - 1) * outputs),
            take(n.T * outputs),
            take(outputs),
            take(passes.chunks * outputs),
            take(route_cost(true).scratch),
            take(gradients_cost().scratch),
            take(last.splits > 1 ? last.splits * weights : 0)};
  }

  template <Pass pass>
  void run_route(const Real* V, const Real* gs, Real* shares, Real* scratch) const {
    const Cost c = route_cost(pass == Pass::backward);
    launch(route<pass, RouteVotes>, c.blocks, route_shape.threads, c.shared, stream, route_shape, source,
           passes, V, gs, shares, scratch);
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
    const Spread spread(n.B * n.J, n.D, passes.chunks);
    for (int64_t t = 1; t <= n.T; ++t) {
      if (t == 1)
        run_route<Pass::uniform>(nullptr, nullptr, a.shares, a.scratch);
      else
        run_route<Pass::forward>(a.V, nullptr, a.shares, a.scratch);
      launch(advance<Real>, spread.blocks(), Spread::threads, Spread::threads * sizeof(Real), stream, spread, a.shares,
             passes.chunks, t == 1, sums + (t - 1) * outputs, v, a.V);
    }
  }

  void backward(const Real* grad, const Real* sums, Real* grad_source, Real* grad_weight, Real* workspace) const {
    Cutter take{workspace};
    const BackwardArrays a = cut_backward(take);
    const Spread alone(n.B * n.J, n.D, 1), spread(n.B * n.J, n.D, passes.chunks);
    launch(prepare<Real>, alone.blocks(), Spread::threads, 0, stream, alone, n.T, sums, grad, a.V, a.gs);
    for (int64_t t = n.T; t >= 2; --t) {
      run_route<Pass::backward>(a.V + (t - 2) * outputs, a.gs + (t - 1) * outputs, a.shares, a.route_scratch);
      launch(retreat<Real>, spread.blocks(), Spread::threads, Spread::threads * sizeof(Real), stream, spread, a.shares,
             passes.chunks, t == n.T, sums + (t - 2) * outputs, a.g, a.gs + (t - 2) * outputs);
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

// f(shape of route, shape of gradients): by the sizes alone. Where J is larger, a block has room for fewer samples.
// gradients holds gW besides: with 8 samples it would spill. ModelSizes: most J, samples, slots, teams, depth.
template <class Real, class F>
void with_shapes(const Sizes& n, F&& f) {
  if constexpr (std::is_same_v<Real, float>)
    if (n.D == 16 && (n.K == 8 || n.stored())) {
      if (n.J <= 4)
        return f(ModelSizes<Real, 4, 8, 1, 4, 8>(n), ModelSizes<Real, 4, 4, 1, 4, 8>(n));
      if (n.J <= 8)
        return f(ModelSizes<Real, 8, 8, 1, 4, 8>(n), ModelSizes<Real, 8, 4, 1, 4, 8>(n));
      if (n.J <= 12)
        return f(ModelSizes<Real, 12, 8, 1, 4, 8>(n), ModelSizes<Real, 12, 4, 1, 4, 8>(n));
      if (n.J <= 16)
        return f(ModelSizes<Real, 16, 8, 1, 4, 8>(n), ModelSizes<Real, 16, 4, 1, 4, 8>(n));
      if (n.J <= 32)
        return f(ModelSizes<Real, 32, 8, 1, 2, 8>(n), ModelSizes<Real, 32, 4, 1, 2, 8>(n));
      if (n.J <= 40)
        return f(ModelSizes<Real, 40, 8, 1, 2, 4>(n), ModelSizes<Real, 40, 4, 1, 2, 4>(n));
      if (n.J <= 64)
        return f(ModelSizes<Real, 64, 8, 1, 1, 4>(n), ModelSizes<Real, 64, 4, 2, 2, 4>(n));
      if (n.J <= 112)
        return f(ModelSizes<Real, 112, 8, 2, 1, 4>(n), ModelSizes<Real, 112, 4, 2, 1, 4>(n));
    }
  const AnySizes<Real, true> narrow(n);
  const Scratch most(narrow, !n.stored(), true, true);
  if (narrow.groups <= narrow.lanes && most.template shared<Real>(narrow) <= shared_limit)
    f(narrow, narrow);
  else
    f(AnySizes<Real, false>(n), AnySizes<Real, false>(n));
}

// f(source), whose rows of 16 bytes, if it has such, begin at multiples of them: copied if need be, to numbers(count),
// for with kernels of its own an unaligned tensor would have results of its own.
template <class Real, class Numbers, class F>
void with_aligned(const Sizes& n, Source<Real> source, cudaStream_t stream, Numbers&& numbers, F&& f) {
  const Real*& data = n.stored() ? source.votes : source.weight;
  source.whole = n.stored() ? n.D % rows == 0 : n.K % pack<Real> == 0;
  if (!source.whole || reinterpret_cast<uintptr_t>(data) % 16 == 0)
    return f(source);
  const int64_t size = n.N * n.J * n.D * (n.stored() ? n.B : n.K);
  const auto copy = numbers(size);
  check(cudaMemcpyAsync(copy.get(), data, size * sizeof(Real), cudaMemcpyDeviceToDevice, stream));
  data = copy.get();
  f(source);
}

// f(plan), for the votes W u or for stored ones. No axis is empty.
template <class Real, class Numbers, class F>
void with_plan(const Sizes& n, const Source<Real>& given, cudaStream_t stream, Numbers&& numbers, F&& f) {
  // Kernels count each of them in an int, and go on by a tile at most; within a tile and a W_i they count numbers.
  STD_TORCH_CHECK(std::max({n.B, n.N, n.K, 32 * n.J * n.D, n.J * n.D * n.K, n.T}) < 1 << 30,
                  "sizes are expected below 2^30");
  with_aligned(n, given, stream, numbers, [&](const auto& source) {
    with_shapes<Real>(n, [&](const auto& route_shape, const auto& gradients_shape) {
      using RouteShape = std::decay_t<decltype(route_shape)>;
      using GradientsShape = std::decay_t<decltype(gradients_shape)>;
      if (n.stored()) {
        using Votes = StoredVotes<GradientsShape, Real>;  // for route as well: samples that share no W may be few
        f(Plan<Votes, Votes>(n, source, stream, gradients_shape, gradients_shape));
      } else {
        using GradientVotes = typename LinearGradients<GradientsShape, Real>::Votes;
        f(Plan<RecomputedVotes<RouteShape, Real>, GradientVotes>(n, source, stream, route_shape, gradients_shape));
      }
    });
  });
}

// ---- the operators on arrays ----------------------------------------------------------------------------------------
//
// numbers(count) makes room for so many. Without a vote, outputs and gradients are 0.

template <class Real, class Numbers>
void run_forward(const Sizes& n, const Source<Real>& source, Real* v, Real* sums, cudaStream_t stream,
                 Numbers&& numbers) {
  if (n.empty()) {
    fill_zeros(v, n.B * n.J * n.D, stream);
    return fill_zeros(sums, n.T * n.B * n.J * n.D, stream);
  }
  with_plan(n, source, stream, numbers, [&](const auto& plan) {
    plan.forward(v, sums, numbers(plan.forward_workspace()).get());
  });
}

template <class Real, class Numbers>
void run_backward(const Sizes& n, const Source<Real>& source, const Real* grad, const Real* sums, Real* grad_source,
                  Real* grad_weight, cudaStream_t stream, Numbers&& numbers) {
  if (n.empty()) {
    fill_zeros(grad_source, n.stored() ? 0 : n.B * n.N * n.K, stream);
    return fill_zeros(grad_weight, n.stored() ? 0 : n.N * n.J * n.D * n.K, stream);
  }
  with_plan(n, source, stream, numbers, [&](const auto& plan) {
    plan.backward(grad, sums, grad_source, grad_weight, numbers(plan.backward_workspace()).get());
  });
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
