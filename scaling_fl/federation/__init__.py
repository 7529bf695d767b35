"""The algorithm: a round, the exact mean, the global model."""
