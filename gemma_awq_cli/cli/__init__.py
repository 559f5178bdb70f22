"""The command line: the Typer app, the console, one file a command."""
