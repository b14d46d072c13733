"""Metrics compared with human opinions: correlations and their uncertainty, the leaderboard, its report."""
