"""Settings of the whole suite, made before any library loads."""

from __future__ import annotations

import logging
import os

from pipelines.cluster import CALM_THREADS

os.environ.update(CALM_THREADS)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
