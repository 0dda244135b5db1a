"""Language models: losses token by token, without logits of the whole vocabulary."""
