"""Bytes of tensors that are alive, counted and not measured: the peak of a computation, the same on every machine."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """``with LiveMemory() as memory: ...``, then ``memory.peak``: the most bytes that tensors made inside held at once.

    A storage counts once, however many views of it there are, until the last of them is gone.
    """

    def __init__(self):
        super().__init__()
        self.peak = self.alive = 0
        self._views: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                self._count(tensor, storage.data_ptr(), storage.nbytes(), storage.data_ptr() in given)
        return result

    def _count(self, tensor, place, size, is_view):
        if not size or (is_view and place not in self._views):  # a view of what was there before
            return
        if place not in self._views:
            self.alive += size
            self.peak = max(self.peak, self.alive)
        self._views[place] = self._views.get(place, 0) + 1
        weakref.finalize(tensor, self._gone, place, size)

    def _gone(self, place, size):
        self._views[place] -= 1
        if not self._views[place]:
            del self._views[place]
            self.alive -= size
