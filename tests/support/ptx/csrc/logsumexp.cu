// csrc's kernels of the contrast for one type (ELEMENT), as PTX to execute.
#include "logsumexp_gradient.cuh"

namespace dreamlip {
template __global__ void exp_sums_kernel<ELEMENT>(const __grid_constant__ Rectangle<ELEMENT>, Exponent, Bands, float*,
                                                  float*);
template __global__ void finish_kernel<ELEMENT>(const __grid_constant__ Rectangle<ELEMENT>, Exponent, Parts, bool,
                                                float*);
template __global__ void pairs_kernel<ELEMENT>(const __grid_constant__ Rectangle<ELEMENT>, Exponent, int, int, float*);
template __global__ void gradient_kernel<ELEMENT>(const __grid_constant__ Rectangle<ELEMENT>,
                                                  const __grid_constant__ Coefficients, const __grid_constant__ Chunk,
                                                  Exponent, const int*, ELEMENT*);
}  // namespace dreamlip
