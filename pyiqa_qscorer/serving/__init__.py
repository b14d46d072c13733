"""Scores over HTTP (`web`), and a page to drop photos on (`drop_page`)."""
