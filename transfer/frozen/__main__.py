"""python -m transfer.frozen --task NAME --ckpt FILE --data DIR --out DIR"""

import sys

from transfer.cli import main
from transfer.frozen.tasks import TASKS

sys.exit(main(TASKS))
