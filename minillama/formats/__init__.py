"""One adapter a file format: a table of names, a permutation where one is needed, nothing else.

An adapter yields (Hugging Face name, tensor) pairs and takes the same. It knows no Decoder.
"""
