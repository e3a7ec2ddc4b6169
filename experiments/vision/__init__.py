"""Vision: pretraining, finetuning and evaluation of image models."""
