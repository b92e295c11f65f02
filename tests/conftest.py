"""One thread: the models are tiny, and results and timing do not depend on what else the machine does."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("dspark", deadline=None)  # a busy machine is no failure
settings.load_profile("dspark")
