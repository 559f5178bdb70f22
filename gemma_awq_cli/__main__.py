"""`python -m gemma_awq_cli` is the `gemma-awq` command."""

import sys

from gemma_awq_cli.cli import main

sys.exit(main())
