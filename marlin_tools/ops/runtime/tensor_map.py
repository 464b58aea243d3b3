"""Tensor maps: how Hopper's copy engine is told about a matrix. The driver encodes one from the matrix's address and shape.

Only the address changes from call to call, so everything else is laid out once, and an unchanged address costs nothing. A map
is encoded into the place where the launch will look for it: the front of the kernel's argument.
"""

import ctypes
from functools import cache
from typing import Any

from marlin_tools.errors import DeviceError

_UINT8, _UINT16, _NO_INTERLEAVE, _SWIZZLE_128, _PROMOTE_256, _FILL_ZEROS = 0, 1, 0, 3, 3, 0  # of CUtensorMap's enumerations
_BOX_BYTES = 128  # of a row: the width of the swizzle


class TensorMap:
    """A matrix of elements of two bytes or one, cut into boxes of `box_rows` x 128 bytes with the 128-byte swizzle. Belongs to
    one thread.
    """

    def __init__(self, place: int, rows: int, columns: int, box_rows: int, element_bytes: int = 2) -> None:
        self._address = ctypes.c_void_p(0)
        self._shapes = (
            (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(columns * element_bytes),
            (ctypes.c_uint32 * 2)(_BOX_BYTES // element_bytes, box_rows),
            (ctypes.c_uint32 * 2)(1, 1),
        )
        kinds = (_NO_INTERLEAVE, _SWIZZLE_128, _PROMOTE_256, _FILL_ZEROS)
        self._arguments = (
            ctypes.c_void_p(place),
            _UINT16 if element_bytes == 2 else _UINT8,
            2,
            self._address,
            *self._shapes,
            *kinds,
        )
        self._encode = _encode_function()

    def point(self, address: int) -> None:
        """Encode the map of the matrix at this address, a multiple of 16."""
        if self._address.value == address:
            return
        self._address.value = address
        status = self._encode(*self._arguments)
        if status:
            self._address.value = 0
            raise DeviceError(
                f"the driver refused a matrix at address {address:#x} (CUDA error {status})",
                hint="activations must begin at a multiple of 16 bytes: `x.clone()` does",
            )


@cache
def _encode_function() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
