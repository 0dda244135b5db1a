"""Rows of images: the pixels that the teacher saw, made again for the student."""
