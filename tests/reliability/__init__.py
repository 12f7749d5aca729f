"""What a run survives. ``run.py`` runs the long parts, the tests beside it the short ones."""
