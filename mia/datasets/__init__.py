"""The data that comes with mia, and files of the same kinds."""
