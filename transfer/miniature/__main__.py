"""python -m transfer.miniature --out DIR"""

import sys

from transfer.miniature.imagenet import main

sys.exit(main())
