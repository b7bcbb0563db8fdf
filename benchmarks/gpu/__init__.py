"""The checks of `make gpu-check`, by what they look at."""
