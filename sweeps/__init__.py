"""Sweeps: many runs, recorded in an Optuna study and compared on a page."""

# In a sweep's workdir: the table of its points, and the folder with a folder of
# each point, which is the workdir of its run.
TABLE, POINTS = 'results.csv', 'points'
