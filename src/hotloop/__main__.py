"""``python -m hotloop``."""

import sys

from .cli.main import main

sys.exit(main())
