"""Any transformers causal LM over a slot cache: extend requests by spans, keep what proved right, release the rest."""

from dspark.target.kv_cache import KVCache
from dspark.target.loading import embedded_pair_folder, load_target
from dspark.target.target import Extension, Target

__all__ = ["Extension", "KVCache", "Target", "embedded_pair_folder", "load_target"]
