"""What tests run in processes of their own: training that is killed, and training that is shared by several."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

import dspark
import dspark.train.files
from dspark.errors import DSparkError
from dspark.train.plan import make_plan
from dspark.train.trainer import Trainer

# Forked from a server that has never run autograd: a process that has cannot fork one that will.
_context = multiprocessing.get_context("forkserver")
# What takes seconds to import. Not this module: the server has not the path to tests, and passes over what it cannot import.
_context.set_forkserver_preload(
    ["dspark.train.trainer", "dspark.train.distributed", "transformers.models.qwen3.modeling_qwen3"]
)


def start(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


def make_trainer(
    target: Path, data: Path, out: Path, recipes: Sequence[Path], cache: Path | None = None, **train: Any
) -> Trainer:
    plan = make_plan(recipes, {"target": target, "data": data, "out": out}, train)
    return Trainer(plan, dspark.load_target(target, dtype="float32", device="cpu"), cache, is_quiet=True)


def train(target: Path, data: Path, out: Path, recipes: Sequence[Path], kill_at: tuple[str, int] | None) -> None:
    """Go on with a run, and die without warning at the n-th `replace` of a file or in the middle of the n-th `save`."""
    torch.set_num_threads(1)
    if kill_at is not None:
        _arm(*kill_at)
    trainer = make_trainer(target, data, out, recipes)
    trainer.resume()
    trainer.run()


def _arm(what: str, number: int) -> None:
    left = number

    def counted(real: Callable[..., Any], before_death: Callable[..., None]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                before_death(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    def write_half(state: Any, path: Path) -> None:
        path.write_bytes(b"half of a file")

    if what == "replace":
        dspark.train.files.os.replace = counted(os.replace, lambda *_: None)  # type: ignore[attr-defined]
    else:
        torch.save = counted(torch.save, write_half)


def train_until_the_disk_is_full(target: Path, data: Path, out: Path, recipes: Sequence[Path], limit: int) -> None:
    """Files of more than `limit` bytes cannot be written: what a full disk looks like to a process."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    trainer = make_trainer(target, data, out, recipes)
    trainer.resume()
    try:
        trainer.run()
    except DSparkError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (out / "error.txt").write_text(str(error), encoding="utf-8")


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def train_together(
    rank: int, size: int, port: int, target: Path, data: Path, out: Path, recipes: Sequence[Path]
) -> None:
    """One of several processes of one run, as torchrun would start it. Leaves word of how many weights it keeps."""
    from torch.distributed.tensor import DTensor

    from dspark.train.distributed import join, leave

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join()
    try:
        trainer = make_trainer(target, data, out, recipes)
        trainer.resume()
        trainer.run()
        weights = trainer.students[0].model.parameters()
        kept = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
        (out / f"kept-{rank}").write_text(str(sum(w.numel() for w in kept)), encoding="utf-8")
    finally:
        leave()
