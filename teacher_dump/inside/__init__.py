"""What is kept of a teacher's inside: hidden states and attentions, and what each way of keeping them costs."""
