"""What the lesson stands on: files, grading and reports. Nothing here imports the lesson."""
