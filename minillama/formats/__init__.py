"""Model file formats, one adapter each: a table of names, a permutation where one is needed, nothing else.

An adapter opens a file as a `ModelFile`, whose tensors have Hugging Face's names, and writes from such
tensors. It knows no Decoder.
"""
