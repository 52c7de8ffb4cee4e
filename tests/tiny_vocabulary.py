"""The words of tiny models, in GPT-2's letters."""

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2; 0 is BOS and EOS
# Each is one token with a space in front, as is each of its prefixes (" th"); so is a plain "The".
WORDS = """
    the and of to in is cat dog sat on mat red blue sky yes no
    The Paris France Rome Italy capital
"""


def gpt2_vocabulary() -> tuple[list[str], list[str]]:
    """Return (tokens, merges): special tokens, the 256 bytes, and WORDS grown by letters."""
    letters = byte_letters()
    tokens = [*SPECIALS, *letters]
    merges: list[str] = []
    for word in [*(f" {word}" for word in WORDS.split()), "The"]:
        chars = [letters[byte] for byte in word.encode()]
        for end in range(2, len(chars) + 1):
            left, right = "".join(chars[: end - 1]), chars[end - 1]
            if left + right not in tokens:
                tokens.append(left + right)
                merges.append(f"{left} {right}")
    return tokens, merges


def byte_letters() -> list[str]:
    """Return GPT-2's printable letter for each of the 256 bytes (a space is `Ġ`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    printable |= set(range(ord("®"), ord("ÿ") + 1))
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
