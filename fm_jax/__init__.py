"""Foundation models in JAX/Flax: pretrain, finetune, evaluate, deploy, understand."""
