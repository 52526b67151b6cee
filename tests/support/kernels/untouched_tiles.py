"""What stands in for the comparison of images in a kernel that has none."""

import triton


@triton.jit
def without_same_image(v, x_images_ptr, y_images_ptr, offs_m, offs_c, M, C):
    """v as it is."""
    return v
