"""Students that read words, or other pieces of them than the teacher does."""
