"""GGUF, llama.cpp's file: settings and weights by family, the vocabulary, the file, and the way back from it."""
