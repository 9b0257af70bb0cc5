"""`python -m buildsys` is `qbuild`."""

import sys

from buildsys.cli.main import main

sys.exit(main())
