"""A recorder for CPU that knows as little as a CUDA graph: which operations ran, on which memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Tape(TorchDispatchMode):
    """Records operations; `replay` runs them again without the Python between them, results in the same memory.

    Like a capture it refuses what would have to wait for values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITING:
            raise RuntimeError(f"{func} waits for the device")
        outputs = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, outputs))
        return outputs

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    num_bytes = 0

    def __init__(self) -> None:
        self.num_recordings = self.num_replays = 0

    def __call__(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.num_recordings += 1
        run()
        with Tape() as tape:
            outputs = run()

        def replay() -> Any:
            self.num_replays += 1
            tape.replay()
            return outputs

        return replay


class RunAgain:
    """Records nothing: runs the function over its inputs again, compiled code included, which a tape does not see."""

    num_bytes = num_recordings = 0

    def __call__(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.num_recordings += 1
        run()
        return run
