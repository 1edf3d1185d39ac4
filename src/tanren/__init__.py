"""tanren: from text to a tuned Hugging Face model, one recipe and one command a stage."""

__version__ = "0.1.0"
