"""Files into files: towers from an mmproj GGUF, and the bundled demo model from nothing."""
