"""Before anything imports torch: its idle threads must not spin on the cores of other tests, as in `run_command`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
