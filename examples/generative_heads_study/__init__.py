"""The study of `generative_heads.py`: two laws in many dimensions, and real digits."""
