"""What runs leave on disk, and what is made of it: logger, runs found again, statistics, tables, figures, a page."""
