"""The report in a real browser, where there is one."""

import re
import shutil
import subprocess

import pytest

from tests.report.page_test import write

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser')


def opened(folder, name, width):
    """Returns a page's document once its scripts are done, and what the browser says of it."""
    done = subprocess.run(
        [
            *(BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr'),
            *('--v=0', '--virtual-time-budget=2000', f'--window-size={width},900'),
            *(f'--user-data-dir={folder / "profile"}', '--host-resolver-rules=MAP * ~NOTFOUND'),
            *('--dump-dom', (folder / name).as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(BROWSER is None, reason='needs chromium')
@pytest.mark.parametrize('width', [1300, 400])
def test_the_page_opens_without_a_message_or_a_request(tmp_path, width):
    write(tmp_path / 'report')
    found, messages = opened(tmp_path, 'report/report.html', width)
    assert not re.search('CONSOLE', messages), messages
    assert found.count('<img') == 6
    assert 'class="found"' in found
