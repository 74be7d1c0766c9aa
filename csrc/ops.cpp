// The operators' schemas, and the Python module that tells how it was built.

// Before any header: macros such as errno would be expanded in the flags. The stamp,
// caps-build/<source hash>/<CPU>/<CUDA architectures>/end, is what a loader looks for in the file itself.
#define CAPS_STRING(...) #__VA_ARGS__
#define CAPS_TEXT(...) CAPS_STRING(__VA_ARGS__)
constexpr char build_stamp[] = CAPS_TEXT(CAPS_STAMP);
constexpr char build_flags[] = CAPS_TEXT(CAPS_FLAGS);

#include <pybind11/pybind11.h>

#include "caps.h"

STABLE_TORCH_LIBRARY(caps, m) {
  m.def("squash(Tensor s) -> Tensor");
  m.def("squash_backward(Tensor grad, Tensor s) -> Tensor");
  m.def("capsule_linear(Tensor inputs, Tensor weight, int iterations) -> (Tensor, Tensor)");
  m.def("capsule_linear_backward(Tensor grad, Tensor inputs, Tensor weight, Tensor sums) -> (Tensor, Tensor)");
  m.def("routing(Tensor votes, int iterations) -> (Tensor, Tensor)");
  m.def("routing_backward(Tensor grad, Tensor votes, Tensor sums) -> Tensor");
  m.def("small_map_conv2d(Tensor maps, Tensor weight, Tensor bias, bool relu) -> Tensor");
  m.def("small_map_conv2d_backward(Tensor grad, Tensor maps, Tensor weight, Tensor? rectified) -> (Tensor, Tensor, Tensor)");
}

PYBIND11_MODULE(caps_native, m) {
  m.doc() = "Capsule routing operators, registered as torch.ops.caps.*";
  m.def("build_info", [] {
    const auto stamp = pybind11::str(build_stamp).attr("split")("/");
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["flags"] = build_flags;
    info["cuda_architectures"] = stamp[pybind11::int_(3)];
    info["source_hash"] = stamp[pybind11::int_(1)];
    info["torch_target"] = "2.11";
    info["cpu"] = stamp[pybind11::int_(2)];
    return info;
  });
}
