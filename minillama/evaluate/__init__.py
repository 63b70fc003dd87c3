"""Evaluation: multiple-choice sets, perplexity, judging, cloze classification, rewards, decontamination."""
