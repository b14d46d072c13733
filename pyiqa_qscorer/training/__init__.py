"""Training: objectives, data, configuration and trainer."""
