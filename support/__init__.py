"""What makes the lesson real: what lies between the algorithm and files, models and machines."""
