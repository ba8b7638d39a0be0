"""minillm: build a large language model, lesson by lesson, and keep it."""
__version__ = "0.1.0"
