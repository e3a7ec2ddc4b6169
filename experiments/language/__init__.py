"""Language: pretraining, finetuning and evaluation of text models."""
