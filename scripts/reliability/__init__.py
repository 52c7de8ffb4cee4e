"""Long random tests: what mia must never do, tried many times.

Wrong numbers, crashes, hangs, exceptions that are no `MiaError`, files that are half written, memory that
grows. docs/reliability.md has what the last long runs gave.
"""
