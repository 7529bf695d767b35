"""What a run leaves: metrics, checkpoints, the model, Sacred's record."""
