"""The rule of the house: what lies in `occjax/` you may import; a folder of it is the program."""

import ast

from tests.conftest import ROOT

FOLDERS = ('experiment', 'probes', 'benchmark', 'report')


def imports(path):
    """Yields the modules of this project that a file imports, such as `occjax.report.page`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(name):
    """Returns the folder of a module of ours; `.` for the root, None for others' modules."""
    first, _, rest = name.partition('.')
    if first != 'occjax':
        return None
    return rest.split('.')[0] if rest.split('.')[0] in FOLDERS else '.'


def test_the_rule_of_the_house():
    may_import = {
        '.': {'.'},
        'report': {'.', 'report'},
        'experiment': {'.', 'report', 'experiment'},
        'probes': {'.', 'report', 'experiment', 'probes'},
        'benchmark': {'.', 'report', 'experiment', 'benchmark'},
    }
    files = list((ROOT / 'occjax').rglob('*.py'))
    assert {path.parent.name for path in files} == {'occjax', *FOLDERS}
    for path in files:
        here = path.parent.name if path.parent.name in FOLDERS else '.'
        for name in imports(path):
            assert not name.startswith('launch'), path
            assert room(name) in {None, *may_import[here]}, f'{path} imports {name}'


def test_no_function_is_longer_than_a_screen():
    for path in [*(ROOT / 'occjax').rglob('*.py'), ROOT / 'launch.py']:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f'{path}: {node.name}'
