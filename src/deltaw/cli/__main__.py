"""`python -m deltaw.cli`."""

import sys

from deltaw.cli.main import main

sys.exit(main())
