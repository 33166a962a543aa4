"""Tells on stderr how far long work is: a bar on a terminal, a line every few seconds in a log."""

import sys
import time
import unicodedata
from collections.abc import Mapping
from typing import TextIO


def printable(text: str) -> str:
    """Returns text for a terminal: what would steer it, or is no character, is spelt out."""
    shown = (c.isprintable() or unicodedata.category(c) == 'Zs' for c in text)
    return ''.join(c if fine else repr(c)[1:-1] for c, fine in zip(text, shown, strict=True))


def printable_lines(text: str) -> str:
    """Returns text of several lines, each of them `printable`."""
    return '\n'.join(map(printable, text.split('\n')))


def tell_end(line: str, file: TextIO | None = None):
    """Prints why the program ends, in a line; the default is stderr."""
    print(f'launch.py: {printable(line)}', file=file or sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """Returns how many there are, `1 image` or `2 images`."""
    ending = 'es' if noun.endswith('s') else 's'
    return f'{count} {noun}' if count == 1 else f'{count} {noun}{ending}'


def say(line: str):
    """Prints a line about the work; stdout is for results."""
    line = printable(line)
    if sys.stderr.isatty():
        from tqdm import tqdm  # Comes with TFDS; leaves its own bar below the line.

        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)


class Progress:
    """How far a loop is, how fast, and how many minutes are left."""

    def __init__(self, total: int, what: str, *, every: float = 10.0):
        """Starts counting.

        Args:
            total: how many there are to do; what is there already is none of them.
            what: is counted, in words.
            every: seconds from one line to the next, where there is no terminal.
        """
        self.total, self.what, self.every, self.bar = total, printable(what), every, None
        self.done, self.began, self.told = 0, time.monotonic(), time.monotonic()
        if total and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=self.what, file=sys.stderr, leave=False)

    @property
    def rate(self) -> float:
        """How many are done in a second."""
        return self.done / (time.monotonic() - self.began)

    def __call__(self, count: int):
        """Counts `count` more as done."""
        self.done += count
        if self.bar is not None:
            self.bar.n = self.done
            self.bar.refresh()
            if self.done >= self.total:
                self.bar.close()
        elif time.monotonic() - self.told >= self.every:
            self.told = time.monotonic()
            left = (self.total - self.done) / self.rate / 60
            say(f'{self.what}: {self.done}/{self.total}, {self.rate:.1f}/s, {left:.1f} min left')


class Pace:
    """Says which of several long works begins, and how many minutes are left at the pace so far."""

    def __init__(self, what: str, costs: Mapping[str, float]):
        """Starts the clock.

        Args:
            what: they are, in words.
            costs: of each by name, in their order, in any unit; of what is stored already 0.
        """
        self.what, self.costs, self.began = what, dict(costs), time.monotonic()

    def __call__(self, name: str):
        """Says that the one of this name begins, after all before it."""
        before = list(self.costs).index(name)
        costs, line = [*self.costs.values()], f'{self.what}: {name}, {before + 1} of '
        line += str(len(costs))
        if done := sum(costs[:before]):
            left = sum(costs[before:]) / done * (time.monotonic() - self.began) / 60
            line += f', {counted(round(left), "minute")} left'
        say(line)
