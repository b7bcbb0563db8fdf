"""Which tasks exist, in the order of the paper's tables."""

from transfer.classification import tasks as classification
from transfer.detection import tasks as detection
from transfer.frozen import tasks as frozen
from transfer.segmentation import tasks as segmentation

TASKS = (*classification.TASKS, *frozen.TASKS, *detection.TASKS, *segmentation.TASKS)
