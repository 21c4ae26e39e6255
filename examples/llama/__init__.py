"""LLaMA in Flax NNX: the model, its weights and its training commands."""
