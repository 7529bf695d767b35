"""Labelled texts: read, tokenised, partitioned to sites."""
