// The operators on the CPU, float32 and float64.
//
// Everything is vertical over SIMD lanes; only the meaning of a lane differs:
//   capsule_linear   a lane is a sample: 16 samples share each number of W_i, and votes live in registers and L1
//   routing          a lane is an input capsule of one sample, and votes are transposed as they are read; small
//                    batches of capsule_linear, which cannot fill the lanes with samples, go this way too
//   small_map_conv2d a lane is a channel
// The work is cut, for routing into lane group × chunk of N, by the sizes alone and partial sums are added in a fixed
// order, so that a result does not depend on the number of threads.
#include "../caps.h"

// Gives all of caps::cpu internal linkage: with external linkage g++ no longer inlines what has a single caller.
namespace caps {
inline namespace {
namespace cpu {}
}  // namespace
}  // namespace caps

#include "linear.h"
#include "routing.h"
#include "small_batch.h"
#include "small_maps.h"
#include "squash.h"

namespace caps::cpu {

Tensor squash(const Tensor& s_) {
  check_squash(s_);
  const Tensor s = torch::stable::contiguous(s_), v = torch::stable::empty_like(s);
  dispatch(s, [&](auto number) {
    using T = decltype(number);
    const int64_t D = s.size(s.dim() - 1);
    const T *from = data<T>(s), *end = from + s.numel();
    T* to = data<T>(v);
    const auto fast = D == 4 ? squash_rows<T, 4> : D == 8 ? squash_rows<T, 8> : D == 16 ? squash_rows<T, 16>
                                                                                        : squash_rows<T, 0>;
    for_capsules<T>(s, [&](int64_t at, int rows, Vec<T>* x, Vec<T>*) {
      if (rows == lanes<T> && fast(from + at, D, to + at)) return;
      load_lanes<T>({from + at, D, end}, rows, D, x);
      squash_capsule<T>(x, x, D);
      store_lanes<T>(x, rows, D, to + at, D);
    });
  });
  return v;
}

Tensor squash_backward(const Tensor& grad_, const Tensor& s_) {
  check_squash_backward(grad_, s_);
  const Tensor grad = torch::stable::contiguous(grad_), s = torch::stable::contiguous(s_);
  const Tensor gs = torch::stable::empty_like(s);
  dispatch(s, [&](auto number) {
    using T = decltype(number);
    const int64_t D = s.size(s.dim() - 1), count = s.numel();
    for_capsules<T>(s, [&](int64_t at, int rows, Vec<T>* x, Vec<T>* g) {
      load_lanes<T>({data<T>(s) + at, D, data<T>(s) + count}, rows, D, x);
      load_lanes<T>({data<T>(grad) + at, D, data<T>(grad) + count}, rows, D, g);
      squash_capsule_backward<T>(x, g, x, D);
      store_lanes<T>(x, rows, D, data<T>(gs) + at, D);
    });
  });
  return gs;
}

std::tuple<Tensor, Tensor> routing(const Tensor& votes_, int64_t iterations) {
  const Sizes n = check_routing(votes_, iterations);
  const Tensor votes = torch::stable::contiguous(votes_);
  const Tensor output = empty(votes, {n.B, n.J, n.D}), sums = empty(votes, {n.T, n.B, n.J, n.D});
  dispatch(votes, [&](auto number) {
    using T = decltype(number);
    Routing<T>{n, data<T>(votes)}.forward(data<T>(output), data<T>(sums));
  });
  return {output, sums};
}

Tensor routing_backward(const Tensor& grad_, const Tensor& votes_, const Tensor& sums_) {
  const Sizes n = check_routing_backward(grad_, votes_, sums_);
  const Tensor grad = torch::stable::contiguous(grad_), votes = torch::stable::contiguous(votes_);
  const Tensor sums = torch::stable::contiguous(sums_), grad_votes = torch::stable::empty_like(votes);
  dispatch(votes, [&](auto number) {
    using T = decltype(number);
    Routing<T>{n, data<T>(votes)}.backward(data<T>(grad), data<T>(sums), data<T>(grad_votes));
  });
  return grad_votes;
}

std::tuple<Tensor, Tensor> capsule_linear(const Tensor& inputs_, const Tensor& weight_, int64_t iterations) {
  const Sizes n = check_capsule_linear(inputs_, weight_, iterations);
  const Tensor inputs = torch::stable::contiguous(inputs_), weight = torch::stable::contiguous(weight_);
  const Tensor output = empty(inputs, {n.B, n.J, n.D}), sums = empty(inputs, {n.T, n.B, n.J, n.D});
  dispatch(inputs, [&](auto number) {
    using T = decltype(number);
    if (is_small_batch<T>(n)) {
      const Tensor votes = make_votes<T>(inputs, weight, n);
      Routing<T>{votes_sizes(n), data<T>(votes)}.forward(data<T>(output), data<T>(sums));
    } else {
      with_linear<T>(inputs, weight, n, [&](const auto& linear) { linear.forward(data<T>(output), data<T>(sums)); });
    }
  });
  return {output, sums};
}

std::tuple<Tensor, Tensor> capsule_linear_backward(const Tensor& grad_, const Tensor& inputs_, const Tensor& weight_,
                                                   const Tensor& sums_) {
  const Sizes n = check_capsule_linear_backward(grad_, inputs_, weight_, sums_);
  const Tensor grad = torch::stable::contiguous(grad_), sums = torch::stable::contiguous(sums_);
  const Tensor inputs = torch::stable::contiguous(inputs_), weight = torch::stable::contiguous(weight_);
  const Tensor grad_inputs = torch::stable::empty_like(inputs), grad_weight = torch::stable::empty_like(weight);
  dispatch(inputs, [&](auto number) {
    using T = decltype(number);
    if (is_small_batch<T>(n)) {
      const Tensor votes = make_votes<T>(inputs, weight, n);  // and, in the same place, their gradient
      Routing<T>{votes_sizes(n), data<T>(votes)}.backward(data<T>(grad), data<T>(sums), data<T>(votes));
      linear_gradients(data<T>(votes), data<T>(inputs), data<T>(weight), n, data<T>(grad_inputs),
                       data<T>(grad_weight));
    } else {
      with_linear<T>(inputs, weight, n, [&](const auto& linear) {
        linear.backward(data<T>(grad), data<T>(sums), data<T>(grad_inputs), data<T>(grad_weight));
      });
    }
  });
  return {grad_inputs, grad_weight};
}

Tensor small_map_conv2d(const Tensor& maps_, const Tensor& weight_, const Tensor& bias_, bool relu) {
  check_small_map_conv2d(maps_, weight_, bias_);
  const Tensor maps = torch::stable::contiguous(maps_), weight = torch::stable::contiguous(weight_);
  const Tensor bias = torch::stable::contiguous(bias_);
  const Tensor output = empty(maps, {maps.size(0), maps.size(1), maps.size(2), weight.size(0)});
  dispatch(maps, [&](auto number) {
    using T = decltype(number);
    with_small_maps<T>(maps, weight, [&](const auto& layer) {
      layer.forward(data<T>(maps), data<T>(bias), relu, data<T>(output));
    });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> small_map_conv2d_backward(const Tensor& grad_, const Tensor& maps_,
                                                             const Tensor& weight_,
                                                             const std::optional<Tensor>& rectified_) {
  STD_TORCH_CHECK(weight_.dim() > 0, "weight has no dimension, expected [O, I, k, k]");
  const Tensor grad_bias = empty(weight_, {weight_.size(0)});
  check_small_map_conv2d(maps_, weight_, grad_bias);
  check_small_map_output("grad", grad_, maps_, weight_);
  if (rectified_) check_small_map_output("rectified", *rectified_, maps_, weight_);
  const Tensor grad = torch::stable::contiguous(grad_), maps = torch::stable::contiguous(maps_);
  const Tensor weight = torch::stable::contiguous(weight_);
  const Tensor rectified = torch::stable::contiguous(rectified_.value_or(grad_));
  const Tensor grad_maps = torch::stable::empty_like(maps), grad_weight = torch::stable::empty_like(weight);
  dispatch(maps, [&](auto number) {
    using T = decltype(number);
    with_small_maps<T>(maps, weight, [&](const auto& layer) {
      layer.backward(data<T>(grad), data<T>(maps), rectified_ ? data<T>(rectified) : nullptr, data<T>(grad_maps),
                     data<T>(grad_weight), data<T>(grad_bias));
    });
  });
  return {grad_maps, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(caps, CPU, m) {
  m.impl("squash", TORCH_BOX(&squash));
  m.impl("squash_backward", TORCH_BOX(&squash_backward));
  m.impl("capsule_linear", TORCH_BOX(&capsule_linear));
  m.impl("capsule_linear_backward", TORCH_BOX(&capsule_linear_backward));
  m.impl("routing", TORCH_BOX(&routing));
  m.impl("routing_backward", TORCH_BOX(&routing_backward));
  m.impl("small_map_conv2d", TORCH_BOX(&small_map_conv2d));
  m.impl("small_map_conv2d_backward", TORCH_BOX(&small_map_conv2d_backward));
}

}  // namespace caps::cpu
