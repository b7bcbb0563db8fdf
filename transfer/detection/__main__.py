"""python -m transfer.detection --task NAME --ckpt FILE --data DIR --out DIR"""

import sys

from transfer.cli import main
from transfer.detection.tasks import TASKS

sys.exit(main(TASKS))
