"""Evaluation: perplexity, log-likelihood, cloze classification."""
