"""Scores over HTTP: one thread that scores for all requests (`worker`), and the application around it (`web`)."""
