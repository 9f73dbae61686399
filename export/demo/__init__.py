"""The demo model: scenes that are drawn, questions about them, a small VLM trained on both, two GGUF files."""
