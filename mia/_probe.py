def extra_buffers_safe() -> bool:
    return True
