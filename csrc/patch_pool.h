// The grouping op's compiled entry points, one pair a processor. Arguments are checked here;
// docs/math.md section 3 is the specification.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace dreamlip {

// patches [N,P,D], texts [N,K,D], one dtype, any strides; threshold below -1e30 means 1 / valid patches;
// normalization: see Normalization;
// patch_mask [N,P] bool or none  ->  pooled [N,K,D], similarity [N,K,P] and inverse patch norms [N,P] in the
// accumulation dtype.
std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_pool_forward_cpu(const at::Tensor& patches,
                                                                      const at::Tensor& texts, double threshold,
                                                                      int64_t normalization,
                                                                      const std::optional<at::Tensor>& patch_mask);
std::tuple<at::Tensor, at::Tensor> patch_pool_backward_cpu(const at::Tensor& patches, const at::Tensor& texts,
                                                           const at::Tensor& similarity, const at::Tensor& inv_norm,
                                                           double threshold, int64_t normalization,
                                                           const std::optional<at::Tensor>& patch_mask,
                                                           const at::Tensor& d_pooled);

#ifdef DREAMLIP_CUDA
std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_pool_forward_cuda(const at::Tensor& patches,
                                                                       const at::Tensor& texts, double threshold,
                                                                       int64_t normalization,
                                                                       const std::optional<at::Tensor>& patch_mask);
std::tuple<at::Tensor, at::Tensor> patch_pool_backward_cuda(const at::Tensor& patches, const at::Tensor& texts,
                                                            const at::Tensor& similarity, const at::Tensor& inv_norm,
                                                            double threshold, int64_t normalization,
                                                            const std::optional<at::Tensor>& patch_mask,
                                                            const at::Tensor& d_pooled);
#endif

}  // namespace dreamlip
