"""Laws of what long work says of itself."""

import io
import sys
import time

from occjax import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_a_line_every_few_seconds(monkeypatch, capsys):
    now = iter([0.0, 0.0, 4.0, 11.0, 11.0, 11.0, 11.0])
    monkeypatch.setattr(time, 'monotonic', lambda: next(now))
    told = progress.Progress(180, 'maps', every=10)
    told(4)  # After 4 seconds.
    told(40)
    monkeypatch.undo()
    assert capsys.readouterr().err == 'maps: 44/180, 4.0/s, 0.6 min left\n'


def test_minutes_left_follow_from_the_costs_of_what_was_made(monkeypatch, capsys):
    now = iter([0.0, 60.0, 240.0])
    monkeypatch.setattr(time, 'monotonic', lambda: next(now))
    costs = {'fgsm': 1, 'bim': 0, 'pgd': 5, 'square': 3}  # BIM's is stored.
    pace = progress.Pace('sweep', costs)
    for name in ('fgsm', 'pgd', 'square'):
        pace(name)
    monkeypatch.undo()
    assert capsys.readouterr().err.splitlines() == [
        'sweep: fgsm, 1 of 4',
        'sweep: pgd, 3 of 4, 8 minutes left',  # 8 at a minute each.
        'sweep: square, 4 of 4, 2 minutes left',  # 3 at 40 seconds each.
    ]


def test_nothing_steers_a_terminal(capsys):
    progress.say('\x1b[2J Tränen 猫\u3000\u202e\n\udcff')
    assert capsys.readouterr().err == '\\x1b[2J Tränen 猫\u3000\\u202e\\n\\udcff\n'
    assert progress.Progress(0, 'a\rb').what == 'a\\rb'
    assert [progress.counted(n, 'image') for n in (0, 1, 2)] == ['0 images', '1 image', '2 images']
    assert [progress.counted(n, 'class') for n in (1, 2)] == ['1 class', '2 classes']


def test_a_terminal_has_a_bar_that_goes_with_the_work(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    told = progress.Progress(6, 'maps')
    told(3)
    progress.say('a line')
    assert '3/6' in terminal.getvalue() and 'maps' in terminal.getvalue()
    told(3)
    assert told.bar.disable  # It is closed.
    assert 'a line\n' in terminal.getvalue()
