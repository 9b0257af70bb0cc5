"""Float32 arithmetic as ggml's scalar C does it: its rounding trick and its order of sums."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

# 1.5 * 2^23: adding it leaves a value rounded half to even in the low mantissa bits.
_MAGIC = np.float32(12582912.0)
# Up to here ggml's nearest_int is round half to even; beyond, it returns low mantissa bits.
ROUND_LIMIT = np.float32(4194303.0)


def nearest_int(v: F32) -> I32:
    """ggml's nearest_int, for every float32 including infinities and NaN."""
    bits = (v + _MAGIC).view(np.int32)
    return (bits & np.int32(0x007FFFFF)) - np.int32(0x00400000)


def sum_in_order(terms: F32) -> F32:
    """terms[0] + terms[1] + ... in float32, left to right; terms [n, m] gives [m]."""
    total: F32 = terms[0].copy()
    for term in terms[1:]:
        total += term
    return total


def fp16_bytes(values: F32) -> npt.NDArray[np.uint8]:
    """Little-endian float16, rounded half to even: [n] gives [n, 2] bytes."""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def fp16_values(raw: npt.NDArray[np.uint8]) -> F32:
    """The inverse: [n, 2] bytes give float32 [n]."""
    return np.ascontiguousarray(raw).view("<f2").reshape(-1).astype(np.float32)
