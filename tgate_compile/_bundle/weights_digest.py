"""Recognise a denoiser by its weights."""

from __future__ import annotations

import hashlib

import torch

from tgate_compile._live_tensors import plain_tensors

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor` in C order: its own memory, if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def weights_digest(denoiser: torch.nn.Module) -> str:
    """SHA-256 over a line `name dtype shape sha256` for each parameter and buffer, sorted by name.

    For example `conv_in.bias float32 4 9f86d0...`; the inner hash is that of the bytes in C order, little-endian.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_tensors(denoiser).items()):
        shape = "x".join(map(str, tensor.shape))
        content = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        digest.update(f"{name} {dtype_name(tensor.dtype)} {shape} {content}\n".encode())
    return digest.hexdigest()


def bit_sums(denoiser: torch.nn.Module) -> tuple[int, ...]:
    """A sum over the bits of each weight: far quicker than the digest, and unequal after any ordinary change."""
    return tuple(
        int(tensor.detach().contiguous().view(_INTEGERS[tensor.itemsize]).sum())
        for tensor in plain_tensors(denoiser).values()
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")
