"""llama.cpp, reached through ctypes: the only room that knows what its memory looks like."""
