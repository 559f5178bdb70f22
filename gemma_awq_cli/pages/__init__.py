"""What lies next to an artifact as a page that a person reads."""
