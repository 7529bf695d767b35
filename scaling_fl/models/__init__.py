"""Pretrained models, and their weights as one vector."""
