"""Data sets that models write: JSONL in, JSONL out."""
