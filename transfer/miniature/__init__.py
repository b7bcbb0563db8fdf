"""The miniature: small generated copies of the datasets in their official layouts, made in seconds.

It is a world for trying things out: no number from it says anything about the real datasets.
"""
