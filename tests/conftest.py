"""One thread: the models are tiny, and results and timing do not depend on what else the machine does."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():  # asked by Triton as it is first imported, whoever does that
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
settings.register_profile("dspark", deadline=None)  # a busy machine is no failure
settings.load_profile("dspark")
