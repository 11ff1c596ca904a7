"""Data: images and expressions in, batches of tensors out. Nothing here knows a model."""
