"""``python -m stts_slowfast``: the command ``stts``."""

import sys

from stts_slowfast.tools.cli import main

sys.exit(main())
