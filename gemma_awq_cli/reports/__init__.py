"""The JSON documents beside an artifact, checked when they come back, and strangers' text made safe to show."""
