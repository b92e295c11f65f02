"""Checkpoints on disk: reading, writing, describing, and whether two fit."""

from dspark.checkpoints.drafter import load_block_drafter, save_drafter
from dspark.checkpoints.facts import check_fit, describe
from dspark.checkpoints.folder import open_checkpoint

__all__ = ["check_fit", "describe", "load_block_drafter", "open_checkpoint", "save_drafter"]
