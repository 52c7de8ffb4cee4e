"""What a client may ask for at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Each of these is for one request, if it does not say otherwise.

    Attributes:
        body, upload: bytes of a body, and of a vector.
        bodies: bytes of the bodies of all requests that are under way.
        choices: prompts × n; n: completions of one prompt.
        logprobs: tokens listed for each one.
        stops, stop_letters: stop texts, and letters of each.
        captured: numbers that captures, lens rows and attention patterns may have.
        vectors, vector_bytes: uploaded vectors of all clients, and their bytes together.
        expression: letters of arithmetic with vectors.
        changes: vectors, patches and blocks.
        edited: numbers that its changes may have, and take from other runs.
        patch_tokens: of the prompts, together, that patches take from.
        look_rows: tokens that the model is run on for one look that hides keys.
        looks: of all clients that run at a time.
        waiting: requests of all clients that are under way or wait; more are answered 503.
        connections: of all clients.
        body_seconds, send_seconds: until a request's head has come, until its body has, and until
            a client has taken a part of the answer.
    """

    body: int = 8 << 20
    upload: int = 64 << 20
    bodies: int = 256 << 20
    choices: int = 128
    n: int = 16
    logprobs: int = 20
    stops: int = 16
    stop_letters: int = 256
    captured: int = 4 << 20
    vectors: int = 64
    vector_bytes: int = 256 << 20
    expression: int = 500
    changes: int = 64
    edited: int = 16 << 20
    patch_tokens: int = 16_384
    look_rows: int = 1 << 17
    looks: int = 4
    waiting: int = 64
    connections: int = 256
    body_seconds: float = 30.0
    send_seconds: float = 30.0
