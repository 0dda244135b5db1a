"""Stores made of stores: merged, with rows dropped, exported.

recut (stored rows into new shards) <- merge, drop;  columns (decoded, a few rows at a time) <- export
"""
