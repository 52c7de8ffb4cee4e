"""From requests to decodes: README.md beside this file tells the whole story, run.py begins it."""
