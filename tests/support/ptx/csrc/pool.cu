// csrc's kernels for one type (ELEMENT) and number of tiles of 8 sub-captions (TILES), as PTX to execute.
#include "patch_pool.cuh"

namespace dreamlip {
template __global__ void forward_kernel<ELEMENT, TILES>(const __grid_constant__ PoolShape, const ELEMENT*,
                                                        const ELEMENT*, const bool*, ELEMENT*, float*, float*);
template __global__ void backward_kernel<ELEMENT, TILES>(const __grid_constant__ PoolShape, const ELEMENT*,
                                                         const ELEMENT*, const ELEMENT*, const bool*, const float*,
                                                         const float*, ELEMENT*, ELEMENT*);
}  // namespace dreamlip
