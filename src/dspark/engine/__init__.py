"""The loop that generation, serving, evaluation and benchmarks share, and what a request meets on its way through it."""
