"""Global and shared memory (PTX ISA section 5.1, "State Spaces"): every access is checked for bounds and alignment.

An address is 64 bits: the number of a region in the upper bits, the offset in the lower ones.
Each tensor of a launch is a region of its own, so that an
access beyond its end falls into nobody's memory. Shared memory begins as NaN (all bits set).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from .errors import Misaligned, OutOfBounds

UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
REGION = 40  # bits of an offset
HALF = 1 << (REGION - 1)  # offsets begin in the middle, so that those before a tensor's beginning are recognized too
SHARED_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW = (number << REGION for number in (1, 2, 3))
FIRST_TENSOR = 16
FENCED, STORE, COPY = 0, 1, 2  # what wrote a word of shared memory since the last fence


@dataclass
class Region:
    """The bytes [start, end) of this process' memory, of the tensors with these names."""

    names: list[str]
    start: int
    end: int

    def __post_init__(self):
        self.skew = self.start % 16
        count = -(-(self.end - self.start + self.skew) // 16) * 16
        memory = np.frombuffer((ctypes.c_uint8 * count).from_address(self.start - self.skew), np.uint8)
        self.views = {size: memory.view(kind) for size, kind in UNSIGNED.items()}

    def check(self, offsets: np.ndarray, size: int, what: str) -> None:
        low, high = int(offsets.min()), int(offsets.max())
        if low < 0 or high + size > self.end - self.start:
            which = low if low < 0 else high
            raise OutOfBounds(
                f"{what} of {size} bytes at byte {which} of {' or '.join(self.names)}, "
                f"which has {self.end - self.start} bytes"
            )


class GlobalMemory:
    """The tensors of a launch, at their own alignments."""

    def __init__(self, tensors: dict[str, tuple[int, int]]):
        """``tensors``: (address, bytes) by name. Those that overlap are one region."""
        self.regions: list[Region] = []
        for name, (start, count) in sorted(tensors.items(), key=lambda item: item[1]):
            if self.regions and start < self.regions[-1].end:
                last = self.regions.pop()
                self.regions.append(Region([*last.names, name], last.start, max(last.end, start + count)))
            else:
                self.regions.append(Region([name], start, start + count))

    def address(self, start: int) -> int:
        """The address in the kernel's eyes of a byte of this process' memory."""
        for number, region in enumerate(self.regions):
            if region.start <= start < max(region.end, region.start + 1):
                return (FIRST_TENSOR + number << REGION) + HALF + region.skew + (start - region.start)
        raise AssertionError("the address belongs to no tensor of the launch")

    def _places(self, addresses: np.ndarray, size: int, what: str):
        """Each region met, with the lanes that meet it and their offsets."""
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise Misaligned(f"{what} of {size} bytes at an address that is no multiple of it")
        numbers = (addresses >> REGION) - FIRST_TENSOR
        for number in np.unique(numbers):
            if not 0 <= number < len(self.regions):
                raise OutOfBounds(f"{what} of {size} bytes at an address of no tensor")
            region = self.regions[number]
            lanes = slice(None) if (numbers == number).all() else np.nonzero(numbers == number)[0]
            offsets = (addresses[lanes] & ((1 << REGION) - 1)) - HALF
            region.check(offsets - region.skew, size, what)
            yield region, lanes, offsets

    def load(self, addresses: np.ndarray, item: int, count: int) -> np.ndarray:
        """[lanes, count] unsigned integers of ``item`` bytes."""
        values = np.empty((len(addresses), count), UNSIGNED[item])
        for region, lanes, offsets in self._places(addresses, item * count, "load"):
            values[lanes] = region.views[item][offsets[:, None] // item + np.arange(count)]
        return values

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """``values`` [lanes, count]."""
        item, count = values.itemsize, values.shape[1]
        for region, lanes, offsets in self._places(addresses, item * count, "store"):
            region.views[item][offsets[:, None] // item + np.arange(count)] = values[lanes]

    def check_load(self, addresses: np.ndarray, size: int) -> None:
        for _ in self._places(addresses, size, "asynchronous load"):
            pass


class BlockMemory:
    """Memory of which each owner has ``size`` bytes: the shared memory of blocks, the local memory of threads.
    It begins as NaN.
    """

    def __init__(self, owners: int, size: int, what: str):
        self.size, self.what = size, what
        self.stride = max(16, -(-size // 16) * 16)
        memory = np.full(owners * self.stride, 0xFF, np.uint8)
        self.views = {bytes_: memory.view(kind) for bytes_, kind in UNSIGNED.items()}
        # Who wrote a word that no fence has made visible to the asynchronous proxy since, which tensor cores read by.
        self.unfenced = np.zeros(len(memory) // 4, np.uint8)

    def places(self, owners: np.ndarray, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        """Checked positions in all owners' memory."""
        addresses = addresses.astype(np.int64)
        low, high = int(addresses.min()), int(addresses.max())
        if low < 0 or high + size > self.size:
            which = low if low < 0 else high
            raise OutOfBounds(f"{what} of {size} bytes at byte {which} of {self.what}, which has {self.size} bytes")
        if size <= 16 and (addresses & (size - 1)).any():
            raise Misaligned(f"{what} of {size} bytes at an address of {self.what} that is no multiple of it")
        return owners * self.stride + addresses

    def load(self, owners: np.ndarray, addresses: np.ndarray, item: int, count: int) -> np.ndarray:
        """[lanes, count] unsigned integers of ``item`` bytes."""
        places = self.places(owners, addresses, item * count, "load")
        if count == 1:
            return self.views[item][places // item][:, None]
        return self.views[item][places[:, None] // item + np.arange(count)]

    def store(self, owners: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """``values`` [lanes, count]."""
        item, count = values.itemsize, values.shape[1]
        places = self.places(owners, addresses, item * count, "store")
        self.put(places[:, None] // item + np.arange(count), values)

    def put(self, indices: np.ndarray, values: np.ndarray, writer: int = STORE) -> None:
        """``values`` at indices of items of their size, written by threads' stores or copies."""
        item = values.itemsize
        self.views[item][indices] = values
        self.unfenced[indices * item // 4] = writer
        if item == 8:
            self.unfenced[indices * 2 + 1] = writer
