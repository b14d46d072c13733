"""`python -m pyiqa_qscorer.cli`, for launchers that start modules (accelerate, torchrun)."""

from .app import main

main()
