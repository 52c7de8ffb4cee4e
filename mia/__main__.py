"""python -m mia"""

from mia.cli import main

main()
