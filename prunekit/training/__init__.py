"""Train pruned models: masks, recovery, adapters."""
