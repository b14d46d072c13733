"""Command line `pyiqa-qscorer`, one module per command."""
