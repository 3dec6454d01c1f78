"""What is written by hand for speed or memory, each beside the plain torch code that it is tested against."""
