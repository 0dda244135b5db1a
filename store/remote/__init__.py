"""Stores elsewhere: pushed, pulled in whole or in part, opened where they are.

elsewhere (files by fsspec or the Hub) <- transfer, ranges, choice, hub, cache <- push, pull, opened
"""
