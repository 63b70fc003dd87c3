"""Data cleaning: a pipeline of steps, from a crawl to a corpus. No torch but in the model score."""
