"""`python -m selm_fast` is the command `selm-fast`."""

from __future__ import annotations

from selm_fast.cli.main import entry

if __name__ == "__main__":
    entry()
