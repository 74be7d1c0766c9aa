// The fused operators on CUDA, float32 and float64. Axis letters: see caps.h.
//
// plan.h has the launches, route.h, outputs.h and gradients.h the kernels. Forward, two launches per iteration:
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
// How the work is cut, and with it the order of every sum, depends on the sizes alone, and no block needs more shared
// memory than every GPU has: so one result holds on all GPUs of an architecture, whatever their size.
// A thread holds four components d of one j for a few samples: in registers with the models' K and D and J up to 112
// (ModelSizes), and with other sizes (AnySizes) up to J·⌈D/4⌉ = 224 or somewhat less, else in a workspace.

#include "../caps.h"
#include "plan.h"

#ifndef CAPS_SHIM
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace caps::cuda {
namespace {

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

// A plan's workspace: `count` numbers like those of a tensor.
template <class Real>
auto numbers_like(const Tensor& tensor) {
  return [&tensor](int64_t count) {
    struct Workspace {
      Tensor tensor;
      Real* get() const { return data<Real>(tensor); }
    };
    return Workspace{empty(tensor, {count})};
  };
}

std::tuple<Tensor, Tensor> capsule_linear(const Tensor& inputs_, const Tensor& weight_, int64_t iterations) {
  const Sizes n = check_capsule_linear(inputs_, weight_, iterations);
  const Context context(inputs_);
  const Tensor inputs = torch::stable::contiguous(inputs_), weight = torch::stable::contiguous(weight_);
  const Tensor v = empty(inputs, {n.B, n.J, n.D}), sums = empty(inputs, {n.T, n.B, n.J, n.D});
  dispatch(inputs, [&](auto number) {
    using Real = decltype(number);
    const Source<Real> source = {nullptr, data<Real>(inputs), data<Real>(weight)};
    run_forward(n, source, data<Real>(v), data<Real>(sums), context.stream, numbers_like<Real>(inputs));
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
    const Source<Real> source = {nullptr, data<Real>(inputs), data<Real>(weight)};
    run_backward(n, source, data<Real>(grad), data<Real>(sums), data<Real>(grad_inputs), data<Real>(grad_weight),
                 context.stream, numbers_like<Real>(inputs));
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
    run_forward<Real>(n, {data<Real>(votes)}, data<Real>(v), data<Real>(sums), context.stream,
                      numbers_like<Real>(votes));
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
    run_backward<Real>(n, {data<Real>(votes)}, data<Real>(grad), data<Real>(sums), data<Real>(grad_votes), nullptr,
                       context.stream, numbers_like<Real>(votes));
  });
  return grad_votes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(caps, CUDA, m) {
  m.impl("squash", TORCH_BOX(&squash));
  m.impl("squash_backward", TORCH_BOX(&squash_backward));
  m.impl("capsule_linear", TORCH_BOX(&capsule_linear));
  m.impl("capsule_linear_backward", TORCH_BOX(&capsule_linear_backward));
  m.impl("routing", TORCH_BOX(&routing));
  m.impl("routing_backward", TORCH_BOX(&routing_backward));
}

}  // namespace caps::cuda
#endif
