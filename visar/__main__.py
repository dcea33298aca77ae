"""`python -m visar` is the `visar` command."""

import sys

from visar.cli.main import main

sys.exit(main())
