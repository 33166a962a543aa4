"""The page in a real browser, where there is one."""

import re
import shutil
import subprocess

import pytest

from tests.report.page_test import write

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser')


@pytest.mark.skipif(BROWSER is None, reason='needs chromium')
@pytest.mark.parametrize('width', [1300, 400])
def test_the_page_opens_without_a_message_or_a_request(tmp_path, width):
    write(tmp_path / 'report')
    url = (tmp_path / 'report' / 'report.html').as_uri()
    done = subprocess.run(
        [
            *(BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr'),
            *('--v=0', '--virtual-time-budget=2000', f'--window-size={width},900'),
            *(f'--user-data-dir={tmp_path / "profile"}', '--host-resolver-rules=MAP * ~NOTFOUND'),
            *('--dump-dom', url),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not re.search('CONSOLE', done.stderr), done.stderr
    assert done.stdout.count('<img') == 6
    assert 'class="found"' in done.stdout
