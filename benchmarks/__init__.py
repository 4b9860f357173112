"""Reproducible measurements: docs/benchmarks.md."""
