"""What trials say about their steps, and what is made of it."""
