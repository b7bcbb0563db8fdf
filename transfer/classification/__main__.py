"""python -m transfer.classification --task NAME --ckpt FILE --data DIR --out DIR"""

import sys

from transfer.classification.tasks import TASKS
from transfer.cli import main

sys.exit(main(TASKS))
