"""The language model: llama.cpp fed with embedding rows instead of token ids.

Imports nothing itself, because loading llama.cpp takes time: take names from the modules (``model``, ``decoder``, ...).
"""
