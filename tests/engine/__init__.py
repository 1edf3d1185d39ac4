"""Each module here may run as a process of its own; they all start as a training does."""

from tanren.engine.eager import import_megatron

import_megatron()
