"""Ranks: how they start, what they send each other, how they end."""
