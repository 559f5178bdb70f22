"""One thin file a subcommand: parse, one call, report."""
