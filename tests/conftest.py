"""One thread: the models are tiny, and results and timing do not depend on what else the machine does."""

import os
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # asked by Triton as it is first imported, whoever does that
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
settings.register_profile("dspark", deadline=None)  # a busy machine is no failure
settings.load_profile("dspark")


_numbers = count()


@pytest.fixture(autouse=True)
def own_graphs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test compiles for itself: where it keeps graphs, there is nothing yet."""
    from dspark.target import kept_graphs

    path = tmp_path_factory.getbasetemp() / f"graphs-{next(_numbers)}"
    monkeypatch.setattr(kept_graphs, "folder", lambda: path)
    return path
