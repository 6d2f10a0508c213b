"""Training of pruned models: masks, recovery, adapters."""
