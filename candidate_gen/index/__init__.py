"""The index over all videos: built from shards, searched where it lies, filtered inside the search."""

from candidate_gen.index.build import Progress, build
from candidate_gen.index.config import IndexConfig
from candidate_gen.index.filters import Excluded, RowFilter
from candidate_gen.index.search import VideoIndex
from candidate_gen.index.shards import Shards

__all__ = ["Excluded", "IndexConfig", "Progress", "RowFilter", "Shards", "VideoIndex", "build"]
