"""What runs leave on disk, and what is made of it: the logger, runs found again, statistics, tables and plots."""
