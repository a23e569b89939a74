"""What a user, a video and an event are, and how rows become model inputs: the same code in training and serving."""
