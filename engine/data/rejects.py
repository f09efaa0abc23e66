"""What was thrown out and why: every filter counts here, and nothing disappears silently."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

EXAMPLES = 3
SHOWN = 300


class Rejects:
    """A count for each reason, the first examples, and all of them in a file where one is given.

    Memory does not grow with what is thrown out; many threads may add.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self._stream = None if path is None else path.open("w", encoding="utf-8")

    def add(self, reason: str, what: object) -> None:
        """Count one thing thrown out, whatever it was."""
        text = what if isinstance(what, str) else json.dumps(what, ensure_ascii=False, default=str)
        # Lone surrogates, which JSON can spell, cannot be written as UTF-8.
        text = text[:SHOWN].encode("utf-8", "replace").decode("utf-8")
        with self._lock:
            self.counts[reason] += 1
            if len(kept := self.examples.setdefault(reason, [])) < EXAMPLES:
                kept.append(text)
            if self._stream:
                line = json.dumps({"reason": reason, "what": text}, ensure_ascii=False)
                self._stream.write(line + "\n")

    def close(self) -> None:
        """Write out what the file still buffers."""
        if self._stream:
            self._stream.close()

    def __str__(self) -> str:
        parts = (f"{count} {reason}" for reason, count in self.counts.most_common())
        return ", ".join(parts) or "none"
