"""Where the jobs of a plan run: side by side on this machine's GPUs or cores, or on a cluster."""
