"""The command line: `scaling-fl`, or `scripts/train_federated.py` in a clone."""
