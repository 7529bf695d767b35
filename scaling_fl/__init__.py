"""Federated fine-tuning of language models in plain PyTorch."""
