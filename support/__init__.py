"""What makes the lesson real: files, names, settings, processes. Nothing here imports the lesson."""
