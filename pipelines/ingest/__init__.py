"""Logs in: any adapter's files become a validated, partitioned, checksummed dataset, and every row is accounted for.

`run` is the main path, `plan` says what there is to do, `jobs` is what Ray's workers do, `report` what came of it, and
`tables` reads the result.
"""

from pipelines.ingest.report import IngestReport, Progress, TableCount
from pipelines.ingest.run import ingest
from pipelines.ingest.tables import IngestError, event_dates, event_parts, load_events, load_table

__all__ = [
    "IngestError",
    "IngestReport",
    "Progress",
    "TableCount",
    "event_dates",
    "event_parts",
    "ingest",
    "load_events",
    "load_table",
]
