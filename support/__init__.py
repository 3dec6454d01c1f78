"""What makes the lesson real: settings, questions, prompts, model files, and the run that holds them."""
