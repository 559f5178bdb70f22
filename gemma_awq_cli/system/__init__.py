"""The program and its operating system: files read and written, locks, and signals."""
