"""`python -m deltaw`."""

import sys

from deltaw.cli.main import main

sys.exit(main())
