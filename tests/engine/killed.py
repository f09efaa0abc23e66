"""A command that is killed while it writes its rows."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE_S = 300


def killed_after(command: Sequence[str], rows: Path, mark: bytes, torn: bytes) -> bytes:
    """Run it until a row holds `mark`, SIGKILL it, leave a torn line; returns the whole lines."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + PATIENCE_S
    while not rows.exists() or mark not in rows.read_bytes():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    kept = rows.read_bytes()
    rows.write_bytes(kept + torn)
    return kept
