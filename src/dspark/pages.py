"""Memory of its own for what is kept for long: it lies apart from what steps need for a moment, and goes back whole.

What an allocator has handed out to both side by side stays with the process once a step needs more than the gaps between
what is kept.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of this shape; dtype and device as of `like`. In the host's memory the system gives a page when it is first
    written, and has all of them back as soon as nobody holds the tensor or a view of it.

    Raises torch.OutOfMemoryError.
    """
    num_bytes = math.prod(shape) * like.element_size()
    if not like.is_cpu or not num_bytes:
        return like.new_zeros(*shape)
    try:
        pages = mmap.mmap(-1, num_bytes, **_PRIVATE)
    except OSError as error:
        raise torch.OutOfMemoryError(f"{num_bytes} bytes are more than the system gives: {error}") from error
    storage = torch.frombuffer(pages, dtype=like.dtype).untyped_storage()
    # No view of anything: compiled graphs take the size of what they are given a view of for granted.
    return like.new_empty(0).set_(storage, 0, torch.Size(shape))  # type: ignore[call-overload]
