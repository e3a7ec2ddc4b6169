"""Public checkpoints: converted, and proved equal."""
