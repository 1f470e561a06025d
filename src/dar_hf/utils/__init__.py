"""What the rest shares: files written atomically, pictures, options and errors of commands, processes, threads."""
