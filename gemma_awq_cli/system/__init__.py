"""Where the program meets the operating system: files read and written, locks, and signals."""
