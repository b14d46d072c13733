"""Metrics compared with human opinions: from datasets to the leaderboard and its report.

datasets            what a user names -> images with opinions
scoring             images through one metric, a row each
runner              every metric on every dataset, into tables that a later run goes on with
cost                memory that a metric needs, and the machine
correlation         agreement of scores with opinions
bootstrap           its uncertainty, and whether one metric is really better
results             tables -> entries and comparisons: the leaderboard
leaderboard_report  the leaderboard for the terminal, as CSV, Markdown, JSON and HTML
plots               pictures of the page
published           figures that others published
"""
