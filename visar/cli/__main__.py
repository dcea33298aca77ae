import sys

from visar.cli.main import main

sys.exit(main())
