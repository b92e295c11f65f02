"""The smallest kernel that shows whether Triton works on a card. Import it only where Triton is installed."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.errors import TritonError


@triton.jit
def _square(matrix, product):
    cell = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    own = tl.load(matrix + cell)
    tl.store(product + cell, tl.dot(own, own))


def probe(device: torch.device) -> None:
    """Multiply a matrix there. Raises RuntimeError where it comes out wrong, or whatever Triton raises."""
    matrix = torch.eye(16, dtype=torch.float16, device=device).flip(0)
    product = torch.zeros(16, 16, device=device)
    with torch.cuda.device_of(matrix):
        try:
            _square[(1,)](matrix, product)
        except TritonError as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
    if not torch.equal(product, torch.eye(16, device=device)):
        raise RuntimeError("a product of two matrices came out wrong")
