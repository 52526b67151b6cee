// `make sanitize`: the CPU kernels over shapes, dtypes,
// strides and masks under AddressSanitizer and UndefinedBehaviorSanitizer.
// Values are the Python tests' business; here every buffer is exactly as long as it should be,
// and a step beyond it aborts.

#include "aligned.h"
#include "patch_pool.h"

#include <ATen/ATen.h>

#include <cstdio>

// Every tensor that the CUDA kernels read begins at a multiple of 16 bytes, and every row of it.
bool aligned_rows() {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf})
    for (const int64_t D : {8, 13, 16}) {
      const at::Tensor buffer = at::randn({3 * 5 * D + 1}, dtype), wide = at::randn({3, 5, 2 * D + 1}, dtype);
      for (const at::Tensor& x :
           {buffer.narrow(0, 1, 3 * 5 * D).view({3, 5, D}), wide.narrow(2, 1, D), wide.narrow(2, 0, D),
            wide.slice(2, 0, 2 * D, 2), wide.narrow(2, 0, D).transpose(0, 1)}) {
        const at::Tensor y = dreamlip::aligned(x);
        const bool ok = y.stride(2) == 1 && y.size(2) % 8 == 0 && y.stride(0) % 8 == 0 && y.stride(1) % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 == 0;
        if (!ok || !at::equal(y.narrow(2, 0, D), x)) return false;
      }
    }
  return true;
}

int main() {
  if (!aligned_rows()) {
    std::printf("aligned() returned rows that are not, or other values\n");
    return 1;
  }
  int calls = 0;
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf})
    for (const int64_t D : {1, 7, 8, 16, 37, 64})
      for (const int64_t P : {1, 3, 4, 9, 50})
        for (const int64_t K : {1, 2, 5, 8, 13})
          for (const int variant : {0, 1, 2, 3}) {
            const int64_t N = 3;
            at::Tensor patches = at::randn({N, P, D}, dtype), texts = at::randn({N, K, D}, dtype),
                       up = at::randn({N, K, D}, dtype);
            std::optional<at::Tensor> mask;
            if (variant == 1) mask = at::rand({N, P}) > 0.4;
            if (variant == 2) patches = at::randn({N, D, P}, dtype).transpose(1, 2);
            if (variant == 3) {
              mask = at::zeros({N, P}, at::kBool);
              up = at::ones({1}, dtype).expand({N, K, D});
            }
            const int64_t normalization = calls % 3;
            const double threshold = calls % 2 ? 0.4 : -1e38;
            const auto [pooled, similarity, inv_norm] =
                dreamlip::patch_pool_forward_cpu(patches, texts, threshold, normalization, mask);
            const auto [d_patches, d_texts] = dreamlip::patch_pool_backward_cpu(patches, texts, similarity, inv_norm,
                                                                                threshold, normalization, mask, up);
            if (!pooled.isfinite().all().item<bool>() || !d_patches.isfinite().all().item<bool>() ||
                !d_texts.isfinite().all().item<bool>()) {
              std::printf("not finite: D %ld P %ld K %ld variant %d\n", long(D), long(P), long(K), variant);
              return 1;
            }
            ++calls;
          }
  std::printf("%d calls clean on %s\n", calls, at::get_cpu_capability().c_str());
  return 0;
}
