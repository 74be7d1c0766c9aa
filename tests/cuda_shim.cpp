// csrc/cuda/ as a shared library without CUDA, with a C interface for test_cuda.py; with CAPS_SHIM_MAIN a program
// that runs every operator on exactly sized arrays, for the address and undefined-behaviour sanitizers.
#include "cuda_shim.h"

#include "../csrc/cuda/operators.cu"

namespace {

std::string last_error;

template <class F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

// `wanted` numbers, all NaN, and not one more.
template <class Real>
std::unique_ptr<Real[]> workspace(int64_t wanted) {
  std::unique_ptr<Real[]> numbers(new Real[wanted]);
  std::fill_n(numbers.get(), wanted, Real(NAN));
  return numbers;
}

caps::Sizes sizes(const int64_t* n) { return {n[0], n[1], n[2], n[3], n[4], n[5]}; }

template <class Real>
int forward(const int64_t* n, const Real* votes, const Real* inputs, const Real* weight, Real* v, Real* sums) {
  return guarded([&] {
    caps::cuda::run_forward<Real>(sizes(n), {votes, inputs, weight}, v, sums, nullptr, workspace<Real>);
  });
}

template <class Real>
int backward(const int64_t* n, const Real* votes, const Real* inputs, const Real* weight, const Real* grad,
             const Real* sums, Real* grad_source, Real* grad_weight) {
  return guarded([&] {
    caps::cuda::run_backward<Real>(sizes(n), {votes, inputs, weight}, grad, sums, grad_source, grad_weight, nullptr,
                                   workspace<Real>);
  });
}

}  // namespace

#define EXPORT(Real, suffix)                                                                                           \
  extern "C" int forward_##suffix(const int64_t* n, const Real* votes, const Real* inputs, const Real* weight, Real* v,\
                                  Real* sums) {                                                                        \
    return forward<Real>(n, votes, inputs, weight, v, sums);                                                           \
  }                                                                                                                    \
  extern "C" int backward_##suffix(const int64_t* n, const Real* votes, const Real* inputs, const Real* weight,        \
                                   const Real* grad, const Real* sums, Real* grad_source, Real* grad_weight) {         \
    return backward<Real>(n, votes, inputs, weight, grad, sums, grad_source, grad_weight);                             \
  }                                                                                                                    \
  extern "C" int squash_##suffix(int64_t vectors, int64_t D, const Real* s, Real* v) {                                 \
    return guarded([&] { caps::cuda::run_squash(vectors, D, s, v, nullptr); });                                        \
  }                                                                                                                    \
  extern "C" int squash_backward_##suffix(int64_t vectors, int64_t D, const Real* grad, const Real* s, Real* gs) {     \
    return guarded([&] { caps::cuda::run_squash_backward(vectors, D, grad, s, gs, nullptr); });                        \
  }
EXPORT(float, float32)
EXPORT(double, float64)

extern "C" const char* shim_error() { return last_error.c_str(); }
extern "C" void shim_turns(unsigned turns) { shim::turns = turns; }

#ifdef CAPS_SHIM_MAIN
template <class Real>
void exercise(std::vector<int64_t> n, unsigned order) {
  shim::turns = order;
  const int64_t B = n[0], N = n[1], K = n[2], J = n[3], D = n[4], T = n[5];
  const bool stored = K < 0;
  const int64_t votes_size = B * N * J * D, inputs_size = stored ? votes_size : B * N * K;
  const int64_t weight_size = stored ? 0 : N * J * D * K;
  std::mt19937 random(order);
  const auto fill = [&](int64_t size) {
    auto numbers = workspace<Real>(size);
    for (int64_t i = 0; i < size; ++i)
      numbers[i] = std::normal_distribution<Real>()(random);
    return numbers;
  };
  const auto inputs = fill(inputs_size), weight = fill(weight_size), grad = fill(B * J * D);
  const auto v = workspace<Real>(B * J * D), sums = workspace<Real>(T * B * J * D);
  const auto gu = workspace<Real>(inputs_size), gw = workspace<Real>(weight_size);
  const Real* const votes = stored ? inputs.get() : nullptr;
  if (forward<Real>(n.data(), votes, inputs.get(), weight.get(), v.get(), sums.get()) ||
      backward<Real>(n.data(), votes, inputs.get(), weight.get(), grad.get(), sums.get(), gu.get(), gw.get()) ||
      squash_backward_float32(0, 1, nullptr, nullptr, nullptr))
    throw std::runtime_error(last_error);
  const auto finite = [](const auto& numbers, int64_t size) {
    for (int64_t i = 0; i < size; ++i)
      if (!std::isfinite(numbers[i]))
        throw std::runtime_error("an output is not finite");
  };
  finite(v, B * J * D), finite(sums, T * B * J * D);
  finite(gu, inputs_size), finite(gw, weight_size);
}

int main() try {
  // B, N, K (-1: stored votes), J, D, T
  const std::vector<std::vector<int64_t>> all = {
      {3, 5, 8, 10, 16, 3},   {33, 2, 8, 10, 16, 2}, {3, 9, -1, 10, 16, 3}, {1, 1, 1, 1, 1, 1},   {5, 3, 9, 3, 7, 2},
      {2, 2, 17, 70, 15, 2},  {4, 3, -1, 7, 5, 4},   {0, 3, 4, 2, 3, 2},    {2, 0, 4, 2, 3, 2},   {0, 3, -1, 2, 3, 2},
      {2, 2, 300, 2, 3, 1},   {70, 3, 4, 2, 4, 2},   {1, 2, 3, 300, 4, 2},  {2, 17, 8, 10, 16, 1}, {9, 3, 8, 17, 16, 2},
      {10, 2, 8, 33, 16, 2},  {5, 2, 8, 65, 16, 2},  {3, 3, -1, 65, 16, 2}, {2, 3, 0, 2, 3, 2},   {2, 3, 4, 0, 3, 2},
      {2, 3, -1, 2, 0, 2},    {2, 2, 5, 500, 3, 2},  {2, 2, -1, 500, 3, 2}};
  unsigned order = 0;
  for (const auto& n : all)
    exercise<float>(n, order++), exercise<double>(n, order++);
  std::puts("no finding");
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
#endif
