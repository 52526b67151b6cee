// The way of an image's boxes through the ring in shared memory: in which order they are needed, when a copy starts,
// when a box may be overwritten.
#pragma once

#include "patch_pool_tiles.cuh"

namespace dreamlip {

// Until at most n (known only at run time) groups are under way.
DREAMLIP_DEVICE void wait_pending(int n) {
  switch (n) {
    case 0: wait_copies<0>(); break;
    case 1: wait_copies<1>(); break;
    case 2: wait_copies<2>(); break;
    case 3: wait_copies<3>(); break;
    case 4: wait_copies<4>(); break;
    case 5: wait_copies<5>(); break;
    case 6: wait_copies<6>(); break;
    case 7: wait_copies<7>(); break;
    case 8: wait_copies<8>(); break;
    default:
      wait_copies<9>();
      break;  // waits for more than it must: correct, and nobody has so many boxes in shared memory
  }
}

// The order in which a block's boxes are needed, and their way through the ring. Step t of an image: pass t / boxes,
// box t % boxes.
template <class T, int KT> struct Ring {
  const PatchPool<T, KT>& pool;
  const T* patches;
  int first, stride;  // images first, first + stride, ...

  DREAMLIP_DEVICE int images() const { return first < pool.s.N ? (pool.s.N - first - 1) / stride + 1 : 0; }

  // Box (column, row) of a step: pass 1 goes along the columns of a row of boxes, pass 2 down each column.
  DREAMLIP_DEVICE void place(int step, int& column_box, int& row_box) const {
    const int boxes = pool.s.boxes(), columns = pool.s.column_boxes(), rows = pool.s.row_boxes();
    const int i = step % boxes;
    const bool second = step / boxes % 2;
    column_box = second ? i / rows : i % columns;
    row_box = second ? i % rows : i / columns;
  }

  // Starts the copy for global step t, if there is one, and commits a group in any case.
  DREAMLIP_DEVICE void start(int t) const {
    const int steps = 2 * pool.s.boxes();
    if (t < images() * steps) {
      int column_box, row_box;
      place(t % steps, column_box, row_box);
      pool.fetch(patches + (first + long(t / steps) * stride) * pool.s.x_image, t % pool.s.slots, column_box, row_box);
    }
    commit_copies();
  }

  // Resident: box i of image number `image` into slot i.
  DREAMLIP_DEVICE void start_box(int image, int i) const {
    if (image < images()) pool.fetch(patches + (first + long(image) * stride) * pool.s.x_image, i, i, 0);
    commit_copies();
  }

  DREAMLIP_DEVICE void prologue() const {
    if (pool.s.resident)
      for (int i = 0; i < pool.s.boxes(); ++i) start_box(0, i);
    else
      for (int t = 0; t < pool.s.slots - 1; ++t) start(t);
  }

  // The box of step t of image number `image`, landed for all threads.
  DREAMLIP_DEVICE char* take(int image, int step) const {
    const int boxes = pool.s.boxes();
    if (pool.s.resident) {
      if (step < boxes) {
        wait_pending(boxes - 1 - step);
        sync_block();
      }
      return pool.box(step % boxes);
    }
    const int t = image * 2 * boxes + step;
    wait_pending(pool.s.slots - 2);
    sync_block();  // everybody has the box, and has left the one before it, which is refilled now
    start(t + pool.s.slots - 1);
    return pool.box(t % pool.s.slots);
  }

  // After the last use of a box.
  DREAMLIP_DEVICE void give(int image, int step) const {
    if (!pool.s.resident) return;
    sync_block();
    start_box(image + 1, step % pool.s.boxes());
  }
};

}  // namespace dreamlip
