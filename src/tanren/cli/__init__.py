"""The command: verbs only. Everything else is imported when a verb needs it."""

from tanren.cli.command import app, main

# isort: off
# The order of --help.
from tanren.cli import stages as _stages  # noqa: F401
from tanren.cli import convert as _convert  # noqa: F401
from tanren.cli import tools as _tools  # noqa: F401
from tanren.cli import images as _images  # noqa: F401
from tanren.cli import chains as _chains  # noqa: F401
from tanren.cli import runs as _runs  # noqa: F401
# isort: on

__all__ = ["app", "main"]
