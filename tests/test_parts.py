"""`make test`: every part runs whatever failed before, and the end says what failed, how long it
took, and the sums"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    'parts', Path(__file__).parents[1] / 'tools' / 'test.py'
)
parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts)


def says(*lines, code=0):
    return [sys.executable, '-c', f'import sys; print({chr(10).join(lines)!r}); sys.exit({code})']


PAGES = '- Completed /a/one.ipynb- Completed /a/two.ipynb', '- Completed /a/three.ipynb'


def run(monkeypatch, capfd, **commands):
    monkeypatch.setattr(parts, 'PARTS', {n: (1, c) for n, c in commands.items()})
    code = parts.main()
    return code, capfd.readouterr().out.splitlines()


def test_what_passes(monkeypatch, capfd):
    code, out = run(
        monkeypatch,
        capfd,
        pages=says(*PAGES),
        tests=says('....', '4 passed, 2 skipped in 1.25s'),
        browser=says('2 passed, 14 deselected, 1 warning in 83.04s (0:01:23)'),
    )
    assert code == 0 and out[-1] == '9 passed, 0 failed, 2 skipped'
    assert re.fullmatch(r'tests +0:\d\d min   4 passed, 2 skipped in 1.25s', out[-3])


def test_style_counts_as_one(monkeypatch, capfd):
    good = says('All checks passed!')
    code, out = run(monkeypatch, capfd, style=good, format=says('173 files already formatted'))
    assert code == 0 and out[-1] == '2 passed, 0 failed'
    bad = says('nbs/a.ipynb:cell 3:2:101: E501 Line too long', 'Found 1 error.', code=1)
    code, out = run(monkeypatch, capfd, style=bad, format=good)
    assert code == 1 and out[-1] == '1 passed, 1 failed'
    broken = says(code=2)
    assert run(monkeypatch, capfd, style=broken)[0] == 1


def test_a_failure_stops_nothing_and_is_named_at_the_end(monkeypatch, capfd):
    code, out = run(
        monkeypatch,
        capfd,
        pages=says(
            *PAGES,
            '',
            'nbdev Tests Failed On The Following Notebooks:',
            '=' * 50,
            '\ttwo.ipynb',
            code=1,
        ),
        tests=says(
            'FAILED tests/test_a.py::test_b[c] - assert 1==2',
            'ERROR tests/test_a.py::test_d',
            '1 failed, 3 passed, 1 error in 2.00s',
            code=1,
        ),
        browser=says('5 passed in 1.00s'),
    )
    end = out[out.index('--- in all') + 1 :]
    assert code == 1 and end[-1] == '10 passed, 3 failed'
    assert [l.split('failed: ')[1] for l in end if 'failed: ' in l] == [
        'two.ipynb',
        'tests/test_a.py::test_b[c]',
        'tests/test_a.py::test_d',
    ]


def test_what_took_longest_is_said(monkeypatch, capfd):
    pages = says(*PAGES, 'two.ipynb: 5 secs', 'one.ipynb: 40 secs')
    tests = says('tests/test_a.py: 7 secs', '4 passed in 1.25s')
    _, out = run(monkeypatch, capfd, pages=pages, tests=tests, browser=says('2 passed in 1.00s'))
    assert [l.split('longest: ')[1] for l in out if 'longest: ' in l] == [
        'one.ipynb 40 s, two.ipynb 5 s',
        'test_a.py 7 s',
    ]


@pytest.mark.parametrize('broken', ['pages', 'tests'])
def test_a_part_that_breaks_down_has_failed(monkeypatch, capfd, broken):
    code, out = run(
        monkeypatch, capfd, **{broken: says('Killed', code=137)}, browser=says('5 passed in 1.00s')
    )
    assert (
        code == 1
        and out[-1] == '5 passed, 1 failed'
        and any('it ended with code 137' in l for l in out)
    )
