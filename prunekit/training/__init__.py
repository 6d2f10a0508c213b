"""Training of pruned models: masks, recovery, adapters."""

from prunekit.training.lora import merge_adapters, merge_low_rank
from prunekit.training.masks import keep_masks

__all__ = ["keep_masks", "merge_adapters", "merge_low_rank"]
