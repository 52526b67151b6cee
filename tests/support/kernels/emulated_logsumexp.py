"""csrc/logsumexp.cuh on the CPU (emulation.py): the ops of csrc/logsumexp.cu."""

import ctypes

import torch
from emulation import emulated

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _structure(name, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kind) for field, kind in fields.items()]})


_POINTERS = dict.fromkeys(
    ("x", "y", "x_mask", "y_mask", "x_images", "y_images", "scale", "multiplier"), ctypes.c_void_p
)
_Call = _structure(
    "Call",
    **_POINTERS,
    **dict.fromkeys(("dtype", "M", "C", "K", "D", "seed"), ctypes.c_int),
    **dict.fromkeys(("x_row", "y_slot", "y_row"), ctypes.c_long),
)
_Coefficients = _structure(
    "Coefficients",
    **dict.fromkeys(("rows", "cols"), ctypes.c_void_p),
    **dict.fromkeys(("row_part", "row_slot", "col_part", "col_slot"), ctypes.c_long),
)
_Parts = _structure(
    "Parts", sums=ctypes.c_void_p, parts=ctypes.c_int, part_stride=ctypes.c_long, slot_stride=ctypes.c_long
)
_Chunk = _structure(
    "Chunk",
    **dict.fromkeys(("first_row", "rows", "first_col", "cols", "first_slot", "slots"), ctypes.c_int),
    **dict.fromkeys(("pitch", "slot_pitch"), ctypes.c_long),
    diagonal=ctypes.c_int,
    has_diagonal=ctypes.c_bool,
)


def _pointer(v):
    return 0 if v is None else v.data_ptr()


class EmulatedOps:
    """``torch.ops.dreamlip_csrc`` as far as csrc/logsumexp.cu goes; ``calls`` lists what was launched."""

    def __init__(self, seed: int = 1):
        self.library = emulated("emulate_logsumexp")
        self.seed, self.calls = seed, []

    def _call(self, name, *tensors):
        """The call's structure, from the first eight arguments of an op."""
        x, y, *optional, _, _ = tensors
        for v, dims in ((x, 1), (y, 2)):  # as csrc/logsumexp.cu checks
            bytes_of = [stride * v.element_size() for stride in v.stride()[:dims]] + [v.shape[-1] * v.element_size()]
            assert v.data_ptr() % 16 == 0 and v.stride(-1) == 1 and all(n % 16 == 0 for n in bytes_of), v.stride()
        assert all(v is None or v.is_contiguous() for v in optional)
        wanted = (torch.bool, torch.bool, torch.int32, torch.int32)
        assert all(v is None or v.dtype == dtype for v, dtype in zip(optional, wanted, strict=True))
        self.calls.append(name)
        sizes = (x.shape[0], y.shape[1], y.shape[0], x.shape[1])
        pointers = map(_pointer, tensors)
        call = _Call(*pointers, DTYPES.index(x.dtype), *sizes, self.seed, x.stride(0), y.stride(0), y.stride(1))
        return ctypes.byref(call)

    def logsumexp_sums(self, *arguments):
        *tensors, first_tile, band_rows, row, col = arguments
        assert row.is_contiguous() and col.is_contiguous() and band_rows % 128 == 0
        call = self._call("sums", *tensors)
        pointers = (ctypes.c_void_p(v.data_ptr()) for v in (row, col))
        self.library.emulate_exp_sums(call, first_tile, row.shape[1], band_rows, *pointers)

    def logsumexp_finish(self, *arguments):
        *tensors, parts, columns, out = arguments
        assert parts.stride(2) == 1 and out.is_contiguous()
        call = self._call("finish", *tensors)
        sums = _Parts(parts.data_ptr(), parts.shape[1], parts.stride(1), parts.stride(0))
        self.library.emulate_finish(call, ctypes.byref(sums), int(columns), ctypes.c_void_p(out.data_ptr()))

    def logsumexp_pairs(self, *arguments):
        *tensors, diagonal, out = arguments
        assert out.is_contiguous()
        call = self._call("pairs", *tensors)
        self.library.emulate_pairs(call, diagonal, ctypes.c_void_p(out.data_ptr()))

    def logsumexp_gradient(self, *arguments):
        *tensors, flag, rows, cols, first_row, first_col, first_slot, diagonal, g = arguments
        assert g.stride(2) == rows.stride(2) == cols.stride(2) == 1
        call = self._call("gradient", *tensors)
        coefficients = _Coefficients(rows.data_ptr(), cols.data_ptr(), *rows.stride()[:2], *cols.stride()[:2])
        corner = (first_row, g.shape[1], first_col, g.shape[2], first_slot, g.shape[0])
        crossed = (0 if diagonal is None else diagonal, diagonal is not None)
        chunk = _Chunk(*corner, g.stride(1), g.stride(0), *crossed)
        references = (ctypes.byref(coefficients), ctypes.byref(chunk))
        self.library.emulate_gradient(call, int(flag), *references, ctypes.c_void_p(g.data_ptr()))
