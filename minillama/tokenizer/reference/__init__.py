"""The tokenizer algorithms as they are told: one file each, to be read, and checked against the libraries."""
