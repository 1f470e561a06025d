"""What the rest shares: atomic writes, grids and plots, options and errors of commands, processes, threads."""
