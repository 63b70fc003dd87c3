"""Reference tokenizer algorithms: one readable file each, tested against the libraries."""
