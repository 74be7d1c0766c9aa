// Routing by agreement (Sabour, Frosst and Hinton 2017) as fused operators: what cpu/ and cuda/ share.
//
// Axis letters: B batch, N input capsules, K input dimension, J output capsules, D output dimension, T iterations.
//
//   inputs u [B, N, K]    weight W [N, J, D, K]    votes û [B, N, J, D], û_bij = W_ij u_bi    output v [B, J, D]
//   sums [T, B, J, D]: the s of each iteration, all that the backward pass keeps besides the arguments
//
// Only torch's stable ABI is used, so that one library runs in every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>

#if defined(__CUDACC__)
#define CAPS_HD __host__ __device__ inline
#else
#define CAPS_HD inline
#endif

namespace caps {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- squash(s) = f s with n = |s| and f = n / (1 + n²) ---------------------------------------------------------------
//
// Its transposed derivative is  gs = f (g + q e (e·g))  with e = s / n and q = (1 - n²) / (1 + n²); 0 at s = 0.
// With r = min(n, 1/n) both are free of n², which overflows early. T is a number, or a vector of numbers in SIMD lanes.

template <class T>
CAPS_HD T squash_factor(T n) {
  const T r = n > 1 ? 1 / n : n;
  return r / (1 + r * r);
}

template <class T>
CAPS_HD T squash_slope(T n) {
  const T r = n > 1 ? 1 / n : n;
  const T q = (1 - r * r) / (1 + r * r);
  return n > 1 ? -q : q;
}

// Components beyond `limit` are multiplied by `shrink`, and those within 1 / limit divided by it, before they are
// squared: powers of two, hence exact.
template <class T>
struct NormRange;
template <>
struct NormRange<float> {
  static constexpr float limit = 0x1p40f, shrink = 0x1p-80f;
};
template <>
struct NormRange<double> {
  static constexpr double limit = 0x1p400, shrink = 0x1p-600;
};

// The factor for a capsule whose largest component is `largest` in magnitude; n = sqrt(Σ (scale s)²) / scale.
// Number: the type within the lanes where T is a vector.
template <class T, class Number = T>
CAPS_HD T norm_scale(T largest) {
  using Range = NormRange<Number>;
  const T zero{};
  const T small = largest < 1 / Range::limit ? zero + 1 / Range::shrink : zero + Number(1);
  return largest > Range::limit ? zero + Range::shrink : small;
}

// ---- checks: before any memory is touched, and naming the argument, what it is and what was expected ---------------

struct Sizes {
  int64_t B = 0, N = 0, K = 0, J = 0, D = 0, T = 0;  // K = -1: the votes are stored

  bool stored() const { return K < 0; }
  bool empty() const { return B == 0 || N == 0 || K == 0 || J == 0 || D == 0; }
};

using Dims = std::initializer_list<int64_t>;  // -1: any

inline std::string shape_text(const int64_t* sizes, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i)
    text += (i ? ", " : "") + (sizes[i] < 0 ? std::string("any") : std::to_string(sizes[i]));
  return text + "]";
}

inline void check_shape(const char* name, const Tensor& tensor, const char* axes, Dims expected) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < sizes.size(); ++i)
    same = expected.begin()[i] < 0 || expected.begin()[i] == sizes[i];
  STD_TORCH_CHECK(same, name, " has shape ", shape_text(sizes.data(), sizes.size()), ", expected ", axes, " = ",
                  shape_text(expected.begin(), expected.size()));
}

inline void check_floating(const char* name, const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, " has dtype ",
                  torch::headeronly::toString(type), ", expected Float (float32) or Double (float64)");
}

inline void check_like(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected that of ", other_name, ", ",
                  torch::headeronly::toString(other.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == other.device(), name, " is on another device than ", other_name, ": ",
                  tensor.is_cpu() ? "cpu" : "cuda:" + std::to_string(tensor.get_device_index()), ", expected ",
                  other.is_cpu() ? "cpu" : "cuda:" + std::to_string(other.get_device_index()));
}

inline void check_iterations(int64_t T) {
  STD_TORCH_CHECK(T >= 1, "iterations is ", T, ", expected at least 1");
}

inline void check_squash(const Tensor& s) {
  check_floating("s", s);
  STD_TORCH_CHECK(s.dim() >= 1, "s has no dimension, expected [..., D]");
}

inline void check_squash_backward(const Tensor& grad, const Tensor& s) {
  check_squash(s);
  check_like("grad", grad, "s", s);
  const auto have = grad.sizes(), want = s.sizes();
  bool same = have.size() == want.size();
  for (size_t i = 0; same && i < have.size(); ++i)
    same = have[i] == want[i];
  STD_TORCH_CHECK(same, "grad has shape ", shape_text(have.data(), have.size()), ", expected that of s, ",
                  shape_text(want.data(), want.size()));
}

inline Sizes check_capsule_linear(const Tensor& inputs, const Tensor& weight, int64_t T) {
  check_iterations(T);
  check_floating("inputs", inputs);
  check_like("weight", weight, "inputs", inputs);
  check_shape("inputs", inputs, "[B, N, K]", {-1, -1, -1});
  const int64_t B = inputs.size(0), N = inputs.size(1), K = inputs.size(2);
  check_shape("weight", weight, "[N, J, D, K]", {N, -1, -1, K});
  return {B, N, K, weight.size(1), weight.size(2), T};
}

inline Sizes check_routing(const Tensor& votes, int64_t T) {
  check_iterations(T);
  check_floating("votes", votes);
  check_shape("votes", votes, "[B, N, J, D]", {-1, -1, -1, -1});
  return {votes.size(0), votes.size(1), -1, votes.size(2), votes.size(3), T};
}

inline Sizes check_gradient(const Tensor& grad, const Tensor& sums, const char* name, const Tensor& data, Sizes n) {
  check_like("grad", grad, name, data);
  check_like("sums", sums, name, data);
  check_shape("grad", grad, "[B, J, D]", {n.B, n.J, n.D});
  check_shape("sums", sums, "[T, B, J, D]", {-1, n.B, n.J, n.D});
  n.T = sums.size(0);
  check_iterations(n.T);
  return n;
}

inline Sizes check_capsule_linear_backward(const Tensor& grad, const Tensor& inputs, const Tensor& weight,
                                           const Tensor& sums) {
  return check_gradient(grad, sums, "inputs", inputs, check_capsule_linear(inputs, weight, 1));
}

inline Sizes check_routing_backward(const Tensor& grad, const Tensor& votes, const Tensor& sums) {
  return check_gradient(grad, sums, "votes", votes, check_routing(votes, 1));
}

// Maps of 1×1, 2×2 or 3×3 pixels, or any with a kernel of 1×1.
inline void check_small_map_conv2d(const Tensor& maps, const Tensor& weight, const Tensor& bias) {
  check_floating("maps", maps);
  check_like("weight", weight, "maps", maps);
  check_like("bias", bias, "maps", maps);
  check_shape("maps", maps, "[B, H, W, I]", {-1, -1, -1, -1});
  check_shape("weight", weight, "[O, I, k, k]", {-1, maps.size(3), -1, -1});
  const int64_t k = weight.size(2);
  check_shape("weight", weight, "[O, I, k, k]", {-1, maps.size(3), k, k});
  check_shape("bias", bias, "[O]", {weight.size(0)});
  STD_TORCH_CHECK(k % 2 == 1, "weight has a kernel of ", k, "×", k, ", expected an odd number");
  const int64_t H = maps.size(1), W = maps.size(2);
  STD_TORCH_CHECK(k == 1 || (H == W && H >= 1 && H <= 3), "maps are of ", H, "×", W, " pixels, expected 1×1, 2×2 or 3×3");
  STD_TORCH_CHECK(maps.size(3) > 0 && weight.size(0) > 0, "weight has shape ",
                  shape_text(weight.sizes().data(), 4), ", expected a channel at least");
}

inline void check_small_map_output(const char* name, const Tensor& tensor, const Tensor& maps, const Tensor& weight) {
  check_like(name, tensor, "maps", maps);
  check_shape(name, tensor, "[B, H, W, O]", {maps.size(0), maps.size(1), maps.size(2), weight.size(0)});
}

// ---- glue -----------------------------------------------------------------------------------------------------------

inline Tensor empty(const Tensor& like, Dims sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()});
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// f(float()) or f(double()) after the dtype of `tensor`.
template <class F>
auto dispatch(const Tensor& tensor, F&& f) {
  return tensor.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

}  // namespace caps
