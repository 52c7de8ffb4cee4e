"""Measures what mia promises about speed and memory, as ratios within one run.

Two ways to do the same work take turns (A B A B …), each pair gives a ratio, and the table
shows the median with the least and the most. Ratios survive another machine; seconds and
megabytes do not, and are shown as figures of this one.

The plain llama.cpp that mia is held against is a decode loop without callback, plan or
captures: what `llama_decode` alone takes, with an argmax per generated token.
"""
