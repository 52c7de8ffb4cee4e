"""mia: mechanistic interpretability on quantized GGUF models, through llama.cpp."""

__version__ = "0.1.0"
