"""The verb `push`: an artifact published on the hub, with its model card and licence."""
