"""Tables: opinions in, scores out."""
