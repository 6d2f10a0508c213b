"""Training of pruned models: masks, recovery, adapters."""

from prunekit.training.lora import add_adapter, merge_adapters, merge_low_rank
from prunekit.training.masked_adapters import mask_adapters
from prunekit.training.masks import keep_masks

__all__ = ["add_adapter", "keep_masks", "mask_adapters", "merge_adapters", "merge_low_rank"]
