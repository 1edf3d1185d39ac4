"""Container images: definitions, locks, wheels, builds, and what a built one says of itself."""
