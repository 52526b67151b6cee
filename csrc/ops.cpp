// The schemas of the compiled ops, their CPU registration, and a module that tells what was built.
// Fake and autograd live in Python (dreamlip_kernels).

#include "logsumexp.h"
#include "patch_pool.h"
#include "patch_pool_plan.h"

#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

TORCH_LIBRARY(dreamlip_csrc, m) {
  m.def(
      "patch_pool_forward(Tensor patches, Tensor texts, float threshold, int normalization, Tensor? patch_mask) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "patch_pool_backward(Tensor patches, Tensor texts, Tensor similarity, Tensor inv_norm, float threshold, int "
      "normalization, "
      "Tensor? patch_mask, Tensor d_pooled) -> (Tensor, Tensor)");
#define DREAMLIP_RECTANGLE                                                                                 \
  "Tensor x, Tensor y, Tensor? x_mask, Tensor? y_mask, Tensor? x_images, Tensor? y_images, Tensor scale, " \
  "Tensor multiplier, "
  m.def("logsumexp_sums(" DREAMLIP_RECTANGLE "int first_tile, int band_rows, Tensor(a!) row, Tensor(b!) col) -> ()");
  m.def("logsumexp_finish(" DREAMLIP_RECTANGLE "Tensor parts, bool columns, Tensor(a!) out) -> ()");
  m.def("logsumexp_pairs(" DREAMLIP_RECTANGLE "int diagonal, Tensor(a!) out) -> ()");
  m.def("logsumexp_gradient(" DREAMLIP_RECTANGLE
        "Tensor flag, Tensor row_vectors, Tensor col_vectors, int first_row, int first_col, int first_slot, "
        "int? diagonal, Tensor(a!) g) -> ()");
#undef DREAMLIP_RECTANGLE
}

TORCH_LIBRARY_IMPL(dreamlip_csrc, CPU, m) {
  m.impl("patch_pool_forward", &dreamlip::patch_pool_forward_cpu);
  m.impl("patch_pool_backward", &dreamlip::patch_pool_backward_cpu);
}

#ifdef DREAMLIP_CUDA
TORCH_LIBRARY_IMPL(dreamlip_csrc, CUDA, m) {
  m.impl("patch_pool_forward", &dreamlip::patch_pool_forward_cuda);
  m.impl("patch_pool_backward", &dreamlip::patch_pool_backward_cuda);
  m.impl("logsumexp_sums", &dreamlip::logsumexp_sums_cuda);
  m.impl("logsumexp_finish", &dreamlip::logsumexp_finish_cuda);
  m.impl("logsumexp_pairs", &dreamlip::logsumexp_pairs_cuda);
  m.impl("logsumexp_gradient", &dreamlip::logsumexp_gradient_cuda);
}
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("patch_pool_shared_bytes", &dreamlip::least_pool_bytes);
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = __VERSION__;
#ifdef DREAMLIP_CUDA
    info["cuda"] = DREAMLIP_CUDA;
    info["cuda_architectures"] = DREAMLIP_CUDA_ARCHITECTURES;
#else
    info["cuda"] = pybind11::none();
    info["cuda_architectures"] = "";
#endif
    return info;
  });
}
