"""What `octavo chat` shows and reads: answers wrapped at words, thoughts dimmed, messages of several lines.

On a terminal everything goes to it. Elsewhere the answers alone go to standard output, as they came and without
colours, and the rest to standard error. Owns no history and no commands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.cells import cell_len

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

_CONTROL: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROL |= dict.fromkeys(range(127, 160), 65533) | {ord("\r"): None}
"""Control characters and what stands for them: an answer must not command the terminal."""
_JOINER = "\u200d"
_QUOTES = '"""'


class Wrapper:
    """Breaks streamed text at `width` cells, between words where it can. A word comes out once its end is known."""

    def __init__(self) -> None:
        self._column = 0
        self._gap = ""
        self._word = ""

    def push(self, text: str, width: int) -> str:
        """What of the text so far can be printed now."""
        out = []
        for char in text:
            if char == "\n":
                out += [self.finish(width), "\n"]
                self._column, self._gap = 0, ""
            elif char in " \t":
                out.append(self.finish(width))
                self._gap += " " if char == " " else "    "
            else:
                wide = cell_len(char) == 2 and not self._word.endswith(_JOINER)
                if wide or cell_len(self._word) >= width:
                    out.append(self.finish(width))
                self._word += char
        return "".join(out)

    def finish(self, width: int) -> str:
        """The word that is held back."""
        if not self._word:
            return ""
        gap, word = self._gap, self._word
        self._gap = self._word = ""
        if self._column > 0 and self._column + cell_len(gap + word) > width:
            gap, self._column = "\n", 0
        self._column += cell_len(gap.strip("\n") + word)
        return gap + word


class Screen:
    """Shows one answer after another; `notes` is where everything else goes."""

    def __init__(self, out: Console, notes: Console) -> None:
        self.out, self.notes = out, notes
        self._wrapper = Wrapper()
        self._thinking = False
        self._begun = False
        self._waiting: Status | None = None

    def begin(self) -> None:
        """An answer is awaited."""
        if self.out.is_terminal:
            self._waiting = self.out.status("", spinner="dots")
            self._waiting.start()

    def think(self, text: str) -> None:
        self._arrived(thinking=True)
        self._show(self.notes, text)

    def say(self, text: str) -> None:
        self._arrived(thinking=False)
        self._show(self.out, text)

    def end(self) -> None:
        """The answer is over, also one that never came."""
        self._stop_waiting()
        if self._begun:
            self._close()
        self._begun = False

    def note(self, text: str) -> None:
        self.notes.print(text, style="dim", markup=False, highlight=False, emoji=False)

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for name, text in rows:
            grid.add_row(Text(name, no_wrap=True), Text(text))
        self.notes.print(grid, style="dim")

    def fail(self, text: str) -> None:
        self.notes.print(text, style="red", markup=False, highlight=False, emoji=False)

    def _arrived(self, *, thinking: bool) -> None:
        self._stop_waiting()
        if self._begun and thinking != self._thinking:
            self._close()
        self._begun, self._thinking = True, thinking

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None

    def _close(self) -> None:
        """Ends the line of what was shown last."""
        console = self.notes if self._thinking else self.out
        if console.is_terminal:
            self._write(console, self._wrapper.finish(console.width))
        self._write(console, "\n")
        self._wrapper = Wrapper()

    def _show(self, console: Console, text: str) -> None:
        if console.is_terminal:
            text = self._wrapper.push(text.translate(_CONTROL), console.width)
        self._write(console, text)

    def _write(self, console: Console, text: str) -> None:
        if console.is_terminal:
            console.out(text, end="", style="dim" if self._thinking else None, highlight=False)
        else:
            console.file.write(text)
            console.file.flush()


def read_message(read: Callable[[str], str]) -> str | None:
    r"""One message, from `read(prompt)`, which returns a line or raises EOFError; None at the end of input.

    A line that ends in a backslash goes on in the next one; what begins with \"\"\" goes on until \"\"\".
    """
    try:
        line = read("> ").strip()
        if not line.startswith(_QUOTES):
            lines = [line]
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(_next(read))
            return "\n".join(lines)
    except EOFError:
        return None
    lines = [line.removeprefix(_QUOTES)]
    with suppress(EOFError):
        while not lines[-1].rstrip().endswith(_QUOTES):
            lines.append(read("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n")


def _next(read: Callable[[str], str]) -> str:
    """The line after; the end of input ends the message, too."""
    try:
        return read("... ").rstrip()
    except EOFError:
        return ""


def line_reader(commands: Iterable[str]) -> Callable[[str], str]:
    """Reads lines of standard input: with editing, history and completion of `commands` on a terminal."""
    if not sys.stdin.isatty():
        return _read_line
    with suppress(ImportError):
        import readline

        names = sorted(commands)
        readline.set_completer_delims("")
        readline.set_completer(lambda text, state: ([n for n in names if n.startswith(text)] + [None])[state])
        readline.parse_and_bind("tab: complete")
    return input


def _read_line(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
