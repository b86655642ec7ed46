"""Report pages: tables, plots and HTML from the files of a run."""
