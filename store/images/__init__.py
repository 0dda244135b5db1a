"""Images in a store: files kept once, and the pixels of each view made again from them.

processing, views <- pixels <- files, verify
"""
