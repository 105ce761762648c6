"""Where in a reply the model still thinks, for what must wait until it has: stop strings."""

from __future__ import annotations

from shoal.chat.reasoning import ReasoningFormat


class ThinkingGate:
    """Parts a text that comes in pieces at the end of the model's reasoning. ``open``: it is behind that, or there was none."""

    def __init__(self, form: ReasoningFormat, opened: bool) -> None:
        self.open = False
        self._form = form
        self._thinks = opened
        self._held = ""  # at the beginning, until it is certain whether the model thinks
        self._tail = ""  # the last characters, which may be the beginning of the end mark

    def push(self, piece: str) -> tuple[str, str]:
        """Take in a piece: how much more is thought, and what follows that."""
        if self.open:
            return "", piece
        if not self._thinks:
            piece, self._held = self._held + piece, ""
            begun = piece.lstrip()
            self._thinks = begun.startswith(self._form.start)
            if not self._thinks and self._form.start.startswith(begun):
                self._held = piece
                return "", ""
            self.open = not self._thinks
            if self.open:
                return "", piece
        return self._thought(piece)

    def flush(self) -> str:
        """What is still held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _thought(self, piece: str) -> tuple[str, str]:
        end = self._form.end
        text = self._tail + piece
        place = text.find(end)
        if place < 0:
            self._tail = text[-(len(end) - 1) :]
            return piece, ""
        self.open = True
        border = place + len(end) - len(self._tail)
        return piece[:border], piece[border:]
