"""python -m tessera.tracking replay | upload: see mirror.py."""

import sys

from tessera.tracking.mirror import main

sys.exit(main())
