"""Data pipeline: sources, held-out split, token shards, and the step -> batch sampler. No torch here."""
