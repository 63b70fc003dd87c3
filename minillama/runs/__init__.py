"""Training runs: configuration, run folder, checkpoints, provenance, progress report."""
