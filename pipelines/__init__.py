"""Batch work: ingest, training, indexing, gate, publish, replay, report, and the command line."""
