"""python -m transfer.segmentation --task NAME --ckpt FILE --data DIR --out DIR"""

import sys

from transfer.cli import main
from transfer.segmentation.tasks import TASKS

sys.exit(main(TASKS))
