// The CUDA kernels of logsumexp.cuh and logsumexp_gradient.cuh as ops: checks and launches.

#include "launch.h"
#include "logsumexp.h"
#include "logsumexp_gradient.cuh"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

namespace dreamlip {
namespace {

constexpr int kTile = LogitTiles<float>::kTile;

int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

bool aligned_16(const at::Tensor& v, int dims) {
  bool ok = reinterpret_cast<uintptr_t>(v.const_data_ptr()) % 16 == 0 && v.stride(-1) == 1;
  for (int i = 0; i < dims; ++i) ok = ok && v.stride(i) * v.element_size() % 16 == 0;
  return ok && v.size(-1) * v.element_size() % 16 == 0;
}

const bool* mask_of(const std::optional<at::Tensor>& mask, int64_t count, const char* name) {
  if (!mask) return nullptr;
  TORCH_CHECK(mask->is_contiguous() && mask->scalar_type() == at::kBool && mask->numel() == count && mask->is_cuda(),
              "logsumexp: ", name, " must be a dense bool CUDA tensor of ", count, " values, got ", mask->sizes());
  return mask->const_data_ptr<bool>();
}

const int* images_of(const std::optional<at::Tensor>& images, int64_t count, const char* name) {
  if (!images) return nullptr;
  TORCH_CHECK(
      images->is_contiguous() && images->scalar_type() == at::kInt && images->numel() == count && images->is_cuda(),
      "logsumexp: ", name, " must be a dense int32 CUDA tensor of ", count, " values, got ", images->sizes());
  return images->const_data_ptr<int>();
}

const float* floats(const at::Tensor& v, int64_t least, const char* name) {
  TORCH_CHECK(v.scalar_type() == at::kFloat && v.is_cuda() && v.numel() >= least, "logsumexp: ", name,
              " must be float32 on the GPU with ", least, " values, got ", v.sizes(), " of ", v.scalar_type());
  return v.const_data_ptr<float>();
}

Exponent exponent_of(const at::Tensor& scale, const at::Tensor& multiplier) {
  return {floats(scale, 1, "scale"), floats(multiplier, 1, "multiplier")};
}

void check_vectors(const at::Tensor& v, int64_t slots, int64_t count, const char* name) {
  TORCH_CHECK(v.dim() == 3 && v.size(0) == 3 && v.size(1) == slots && v.size(2) == count && v.stride(2) == 1,
              "logsumexp: ", name, " must be [3, ", slots, ", ", count, "], the last dimension dense, got ", v.sizes());
}

template <class T>
Rectangle<T> describe(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& x_mask,
                      const std::optional<at::Tensor>& y_mask, const std::optional<at::Tensor>& x_images,
                      const std::optional<at::Tensor>& y_images) {
  TORCH_CHECK(x.is_cuda() && y.is_cuda() && x.dim() == 2 && y.dim() == 3 && x.size(1) == y.size(2) &&
                  x.scalar_type() == y.scalar_type(),
              "logsumexp: x [M, D] and y [K, C, D] must be CUDA tensors of one dtype that share D, got ", x.sizes(),
              " and ", y.sizes());
  TORCH_CHECK(aligned_16(x, 1) && aligned_16(y, 2), "logsumexp: rows of x and y must begin at multiples of 16 bytes");
  constexpr int64_t kMost = (int64_t(1) << 31) - 2 * kTile;  // rows are counted in int, tiles beyond them too
  TORCH_CHECK(
      x.size(0) < kMost && y.size(1) < kMost && y.size(0) < 65536 && tiles_of(y.size(1)) < 65536 * int64_t(kTile),
      "logsumexp: too many rows, columns or slots: ", x.sizes(), " and ", y.sizes());
  Rectangle<T> r{};
  r.x = static_cast<const T*>(x.const_data_ptr());
  r.y = static_cast<const T*>(y.const_data_ptr());
  r.M = int(x.size(0));
  r.C = int(y.size(1));
  r.K = int(y.size(0));
  r.D = int(x.size(1));
  r.x_row = x.stride(0);
  r.y_slot = y.stride(0);
  r.y_row = y.stride(1);
  r.x_mask = mask_of(x_mask, r.M, "x_mask");
  r.y_mask = mask_of(y_mask, int64_t(r.K) * r.C, "y_mask");
  TORCH_CHECK(x_images.has_value() == y_images.has_value(), "logsumexp: x_images and y_images come together");
  r.x_images = images_of(x_images, r.M, "x_images");
  r.y_images = images_of(y_images, r.C, "y_images");
  return r;
}

// f(T{}) for the dtype of x.
template <class F> void with_type(const at::Tensor& x, F f) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return f(__nv_bfloat16{});
    case at::kHalf: return f(__half{});
    case at::kFloat: return f(float{});
    default: TORCH_CHECK(false, "logsumexp: x must be bfloat16, float16 or float32, got ", x.scalar_type());
  }
}

template <class T, class Kernel, class... Arguments> void launch(Kernel kernel, dim3 grid, Arguments... arguments) {
  constexpr int kShared = LogitTiles<T>::kSharedBytes;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  kernel<<<grid, LogitTiles<T>::kThreads, kShared, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void logsumexp_sums_cuda(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& x_mask,
                         const std::optional<at::Tensor>& y_mask, const std::optional<at::Tensor>& x_images,
                         const std::optional<at::Tensor>& y_images, const at::Tensor& scale,
                         const at::Tensor& multiplier, int64_t first_tile, int64_t band_rows, at::Tensor row,
                         at::Tensor col) {
  const c10::cuda::CUDAGuard guard(x.device());
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const Rectangle<T> r = describe<T>(x, y, x_mask, y_mask, x_images, y_images);
    const int64_t tiles = row.size(1), bands = col.size(0);
    TORCH_CHECK(row.is_contiguous() && row.dim() == 3 && row.size(0) == r.K && row.size(2) == r.M && tiles < 65536 &&
                    first_tile >= 0 && first_tile + tiles <= tiles_of(r.C),
                "logsumexp: row must be dense [K, tiles, M] of tiles that y has, got ", row.sizes());
    TORCH_CHECK(band_rows > 0 && band_rows % kTile == 0 && bands == (r.M + band_rows - 1) / band_rows &&
                    col.is_contiguous() && col.numel() == bands * r.K * r.C,
                "logsumexp: col must be dense [bands, K, C] for bands of whole tiles, got ", col.sizes());
    floats(row, 0, "row");
    floats(col, 0, "col");
    if (tiles && bands && r.K)
      launch<T>(exp_sums_kernel<T>, dim3(bands, tiles, r.K), r, exponent_of(scale, multiplier),
                Bands{int(first_tile), int(tiles), int(band_rows)}, row.mutable_data_ptr<float>(),
                col.mutable_data_ptr<float>());
  });
}

void logsumexp_finish_cuda(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& x_mask,
                           const std::optional<at::Tensor>& y_mask, const std::optional<at::Tensor>& x_images,
                           const std::optional<at::Tensor>& y_images, const at::Tensor& scale,
                           const at::Tensor& multiplier, const at::Tensor& parts, bool columns, at::Tensor out) {
  const c10::cuda::CUDAGuard guard(x.device());
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const Rectangle<T> r = describe<T>(x, y, x_mask, y_mask, x_images, y_images);
    const int64_t rows = columns ? r.C : r.M;
    TORCH_CHECK(out.is_contiguous() && out.numel() == r.K * rows, "logsumexp: out must be dense [K, ", rows, "], got ",
                out.sizes());
    TORCH_CHECK(parts.dim() == 3 && parts.size(0) == r.K && parts.size(2) == rows && parts.stride(2) == 1,
                "logsumexp: parts must be [K, parts, ", rows, "], the last dimension dense, got ", parts.sizes());
    floats(out, 0, "out");
    const Parts sums{floats(parts, 0, "parts"), int(parts.size(1)), parts.stride(1), parts.stride(0)};
    if (rows && r.K)
      launch<T>(finish_kernel<T>, dim3(tiles_of(rows), r.K), r, exponent_of(scale, multiplier), sums, columns,
                out.mutable_data_ptr<float>());
  });
}

void logsumexp_pairs_cuda(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& x_mask,
                          const std::optional<at::Tensor>& y_mask, const std::optional<at::Tensor>& x_images,
                          const std::optional<at::Tensor>& y_images, const at::Tensor& scale,
                          const at::Tensor& multiplier, int64_t diagonal, at::Tensor out) {
  const c10::cuda::CUDAGuard guard(x.device());
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const Rectangle<T> r = describe<T>(x, y, x_mask, y_mask, x_images, y_images);
    TORCH_CHECK(out.is_contiguous() && out.numel() == int64_t(r.K) * r.C, "logsumexp: out must be dense [K, ", r.C,
                "], got ", out.sizes());
    floats(out, 0, "out");
    const int64_t first = std::max<int64_t>(0, -diagonal), stop = std::min<int64_t>(r.C, r.M - diagonal);
    if (first < stop && r.K)
      launch<T>(pairs_kernel<T>, dim3(tiles_of(stop - first), r.K), r, exponent_of(scale, multiplier), int(diagonal),
                int(first), out.mutable_data_ptr<float>());
  });
}

void logsumexp_gradient_cuda(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& x_mask,
                             const std::optional<at::Tensor>& y_mask, const std::optional<at::Tensor>& x_images,
                             const std::optional<at::Tensor>& y_images, const at::Tensor& scale,
                             const at::Tensor& multiplier, const at::Tensor& flag, const at::Tensor& row_vectors,
                             const at::Tensor& col_vectors, int64_t first_row, int64_t first_col, int64_t first_slot,
                             std::optional<int64_t> diagonal, at::Tensor g) {
  const c10::cuda::CUDAGuard guard(x.device());
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const Rectangle<T> r = describe<T>(x, y, x_mask, y_mask, x_images, y_images);
    TORCH_CHECK(g.dim() == 3 && g.scalar_type() == x.scalar_type() && g.is_cuda() && g.stride(2) == 1,
                "logsumexp: g must be [slots, rows, cols] of the dtype of x, its columns dense");
    Chunk chunk{};
    chunk.first_row = int(first_row);
    chunk.first_col = int(first_col);
    chunk.first_slot = int(first_slot);
    chunk.slots = int(g.size(0));
    chunk.rows = int(g.size(1));
    chunk.cols = int(g.size(2));
    chunk.pitch = g.stride(1);
    chunk.slot_pitch = g.stride(0);
    chunk.has_diagonal = diagonal.has_value();
    chunk.diagonal = int(diagonal.value_or(0));
    TORCH_CHECK(first_row >= 0 && first_col >= 0 && first_slot >= 0 && first_row + chunk.rows <= r.M &&
                    first_col + chunk.cols <= r.C && first_slot + chunk.slots <= r.K,
                "logsumexp: g ", g.sizes(), " reaches beyond x ", x.sizes(), " or y ", y.sizes());
    check_vectors(row_vectors, r.K, r.M, "row_vectors");
    check_vectors(col_vectors, r.K, r.C, "col_vectors");
    const Coefficients coefficients{floats(row_vectors, 0, "row_vectors"),
                                    floats(col_vectors, 0, "col_vectors"),
                                    row_vectors.stride(0),
                                    row_vectors.stride(1),
                                    col_vectors.stride(0),
                                    col_vectors.stride(1)};
    const int64_t tiles = tiles_of(chunk.rows) * tiles_of(chunk.cols);
    TORCH_CHECK(tiles < (int64_t(1) << 31), "logsumexp: g has too many tiles, ", g.sizes());
    if (tiles && chunk.slots)
      launch<T>(gradient_kernel<T>, dim3(tiles, chunk.slots), r, coefficients, chunk, exponent_of(scale, multiplier),
                flag.const_data_ptr<int>(), static_cast<T*>(g.mutable_data_ptr()));
  });
}

}  // namespace dreamlip
