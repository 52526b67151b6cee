// Tensors as the CUDA kernels read them.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace dreamlip {

// Rows of whole 16-byte chunks: the width padded to a multiple of 8, the last dimension dense, every row aligned.
// clone(), since contiguous() would return a dense tensor whose first element lies at an odd address as it is.
inline at::Tensor aligned(const at::Tensor& x) {
  const int64_t rest = (8 - x.size(2) % 8) % 8;
  if (rest) return at::constant_pad_nd(x, {0, rest});
  const bool ok = x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 &&
                  reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  return ok ? x : x.clone(at::MemoryFormat::Contiguous);
}

}  // namespace dreamlip
