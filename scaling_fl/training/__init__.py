"""One model on one device, in plain PyTorch. It knows nothing of federations."""
