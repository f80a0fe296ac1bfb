"""Data sets: where their images are, and the one that is drawn here."""
