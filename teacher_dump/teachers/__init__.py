"""Teachers: saved ones, ones given as objects, ones that read images."""
