"""Several teachers as one: stores whose rows are the same, joined, and what their average says."""
