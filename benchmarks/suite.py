"""Which tasks exist, in the order of the paper's tables."""

from transfer import classification, detection, robustness, segmentation

TASKS = (*classification.TASKS, *robustness.TASKS, *detection.TASKS, *segmentation.TASKS)
