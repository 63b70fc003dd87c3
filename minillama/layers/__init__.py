"""Layers of a decoder block, one idea per file.

Shapes everywhere: B batch, T time (queries), S slots (keys), V vocabulary, D model width,
H query heads, K key/value heads, E head width, F feed-forward width.
"""
