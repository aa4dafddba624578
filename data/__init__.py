"""Corpora and tokenizers; `prepare.py` is the command."""
