"""Teacher outputs that others have kept, read row by row: which tokens, and what the teacher said at each.

files <- numbers <- rows <- topk, distillkit, responses <- formats
"""
