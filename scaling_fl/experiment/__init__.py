"""What a run is: its settings, and what they build."""
