"""What this tool has on the disk: artifacts, exports, unfinished work and its cache."""
