"""`python -m buildsys` is `qbuild`."""

import sys

from buildsys.cli.main import command

sys.exit(command())
