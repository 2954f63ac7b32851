"""The command line. Every command imports what it needs when it runs, so that `kullback --help` answers at once."""

from kullback.cli import run  # noqa: F401  # each registers its commands, in the order of the help

# isort: split
from kullback.cli import frontier  # noqa: F401

# isort: split
from kullback.cli import diffusion  # noqa: F401

# isort: split
from kullback.cli import look  # noqa: F401
from kullback.cli.app import app

__all__ = ["app"]
