"""The JSON documents beside an artifact, checked when they are read, and strangers' text made safe to show."""
