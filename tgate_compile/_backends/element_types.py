"""torch's dtypes in ONNX."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# ONNX's numbers for element types (onnx.TensorProto.DataType): numpy has no bfloat16 and no fp8.
ELEMENT_TYPES: Mapping[torch.dtype, int] = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
    torch.float8_e4m3fn: 17,
    torch.float8_e5m2: 19,
}
