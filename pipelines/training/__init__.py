"""One resumable training loop for both models, on one process or many: what it reads, keeps, tells and survives."""
