"""Scaling laws: their fits from finished runs, compute-optimal planning, IsoFLOP sweeps."""
