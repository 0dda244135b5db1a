"""More rows from the rows there are: words replaced by others that fit there (TinyBERT, arXiv:1909.10351)."""
