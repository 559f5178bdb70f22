"""A fuzz harness of our own: valid tiny model folders, damaged with knowledge of their structure, through the command.

`python -m tests.fuzz --help` says how it is run; docs/security.md what it looks for. `cases.py` is what a case is,
`kinds/` make them, `steps.py` does the damage, `worker.py` runs them, `harness.py` judges.
"""
