"""Sweeps: many runs, recorded in an Optuna study and compared on a page."""
