"""What a run writes for people: logs, pictures, summaries."""
