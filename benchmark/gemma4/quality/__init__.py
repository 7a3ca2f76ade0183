"""Answers, beside those of transformers."""
