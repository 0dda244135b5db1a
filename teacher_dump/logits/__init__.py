"""What is kept of logits, of classes and of tokens, and how true it is."""
