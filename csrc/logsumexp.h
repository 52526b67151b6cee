// The kernels of bidirectional_logsumexp as ops for CUDA tensors; what they compute is told in logsumexp.cuh, and what
// is made of it in dreamlip_kernels/ops/logsumexp_cuda.py. Results go into the caller's tensors.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace dreamlip {

// All of them: x [M, D], y [K, C, D], one dtype of bfloat16, float16 and float32, D and every stride multiples of 16
// bytes, as their addresses are; x_mask [M] and y_mask [K, C] bool, dense, or none; x_images [M] and y_images [C]
// int32, dense, or none; scale and multiplier: see Exponent, one float32 each. Rows and columns are counted in tiles of
// 128.

// row [K, tiles, M]: sums over each tile of columns from first_tile; col [bands, K, C]: over bands of band_rows rows.
void logsumexp_sums_cuda(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& x_mask,
                         const std::optional<at::Tensor>& y_mask, const std::optional<at::Tensor>& x_images,
                         const std::optional<at::Tensor>& y_images, const at::Tensor& scale,
                         const at::Tensor& multiplier, int64_t first_tile, int64_t band_rows, at::Tensor row,
                         at::Tensor col);

// out [K, M], or with `columns` [K, C]: log-sum-exps from partial sums [K, parts, M or C], the last dimension dense.
void logsumexp_finish_cuda(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& x_mask,
                           const std::optional<at::Tensor>& y_mask, const std::optional<at::Tensor>& x_images,
                           const std::optional<at::Tensor>& y_images, const at::Tensor& scale,
                           const at::Tensor& multiplier, const at::Tensor& parts, bool columns, at::Tensor out);

// out [K, C]: the logits of the pairs (diagonal + j, j) where there is such a row; elsewhere it stays as it is.
void logsumexp_pairs_cuda(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& x_mask,
                          const std::optional<at::Tensor>& y_mask, const std::optional<at::Tensor>& x_images,
                          const std::optional<at::Tensor>& y_images, const at::Tensor& scale,
                          const at::Tensor& multiplier, int64_t diagonal, at::Tensor out);

// g [S, rows, cols]: coefficients of the rows from first_row and the columns from first_col of the slots from
// first_slot; the pairs (diagonal + j, j) are 0. row_vectors [3, K, M], col_vectors [3, K, C]: see Coefficients.
void logsumexp_gradient_cuda(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& x_mask,
                             const std::optional<at::Tensor>& y_mask, const std::optional<at::Tensor>& x_images,
                             const std::optional<at::Tensor>& y_images, const at::Tensor& scale,
                             const at::Tensor& multiplier, const at::Tensor& flag, const at::Tensor& row_vectors,
                             const at::Tensor& col_vectors, int64_t first_row, int64_t first_col, int64_t first_slot,
                             std::optional<int64_t> diagonal, at::Tensor g);

}  // namespace dreamlip
