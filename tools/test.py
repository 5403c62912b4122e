"""All that is tested, part after part, whatever failed before: `python tools/test.py`. It ends with
what failed, how long each part took and what in it took longest, and one line of sums; the exit
code is 1 if anything failed. A page of `nbs/` counts as a test."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

PYTEST = [sys.executable, '-m', 'pytest', '-q', '-rfE', '--durations=10', '--durations-min=5']
PARTS = dict(  # name -> (threads of each process, command)
    style=(1, ['ruff', 'check', '.']),
    format=(1, ['ruff', 'format', '--check', '.']),
    pages=(1, ['nbdev_test', '--n_workers', '2', '--do_print', '--timing']),
    tests=(
        1,
        [*PYTEST, 'tests', '--ignore=tests/test_browser.py', '-n', '2', '--dist', 'loadfile'],
    ),
    browser=(2, [*PYTEST, 'tests/test_browser.py']),
)


class Outcome(NamedTuple):
    counts: Counter  # `passed`, `failed`, `skipped`
    failed: list  # Names
    said: str  # The part's own closing line


def of_pages(
    lines: list,  # What `nbdev_test --do_print` printed
) -> Outcome:
    "Pages that were completed, less those that are listed as failed"
    done = sum(l.count('- Completed ') for l in lines)  # two workers may share a line
    head = next((i for i, l in enumerate(lines) if 'Tests Failed On The Following' in l), None)
    failed = [] if head is None else [l.strip() for l in lines[head + 2 :] if l.startswith('\t')]
    return Outcome(Counter(passed=done - len(failed), failed=len(failed)), failed, f'{done} pages')


def of_tests(
    lines: list,  # What pytest printed
) -> Outcome:
    "What pytest's last line counts; errors are failures"
    said = next((l for l in reversed(lines) if re.search(r'\d+ \w+.* in [\d.]+s', l)), '').strip(
        '= '
    )
    n = {k: int(v) for v, k in re.findall(r'(\d+) (passed|failed|errors?|skipped)', said)}
    failed = [
        l.split(' ', 1)[1].split(' - ')[0] for l in lines if re.match(r'(FAILED|ERROR) \S', l)
    ]
    return Outcome(
        Counter(
            passed=n.get('passed', 0),
            failed=n.get('failed', 0) + n.get('error', 0) + n.get('errors', 0),
            skipped=n.get('skipped', 0),
        ),
        failed,
        said,
    )


def of_style(
    lines: list,  # What ruff printed
) -> Outcome:
    "What ruff's last line says, counted as one; what it found stands above"
    said = next((l for l in reversed(lines) if l.strip()), '')
    good = bool(re.match(r'All checks passed|\d+ files? already formatted', said))
    return Outcome(Counter(passed=int(good), failed=int(not good)), [] if good else ['ruff'], said)


READ = dict(pages=of_pages, style=of_style, format=of_style)  # all others are pytest's


def run(
    command: list,  # Of a part
    threads: int,  # For each of its processes
) -> tuple:  # (exit code, lines)
    "Run a part; what it prints is seen at once"
    env = os.environ | dict(OMP_NUM_THREADS=str(threads), PYTHONUNBUFFERED='1')
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        env=env,
    ) as p:
        lines = []
        for l in p.stdout:
            print(l, end='', flush=True)
            lines.append(l.rstrip('\n'))
    return p.returncode, lines


def outcome(
    name: str,  # Of the part
    code: int,  # It ended with
    lines: list,  # It printed
) -> Outcome:
    "What came of a part; one that breaks down has failed, whatever it counted"
    o = READ.get(name, of_tests)(lines)
    if not code or o.counts['failed']:
        return o
    return o._replace(
        counts=o.counts + Counter(failed=1),
        failed=[f'the part as a whole: it ended with code {code}'],
    )


def clock(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02} min'


def longest(
    lines: list,  # A part printed
) -> str:
    "Files that took longest, by lines such as `one.ipynb: 12 secs`, which nbdev prints"
    took = re.findall(r'^(\S+): (\d+) secs$', '\n'.join(lines), re.MULTILINE)
    most = sorted(took, key=lambda t: -int(t[1]))[:12]
    return ', '.join(f'{Path(file).name} {seconds} s' for file, seconds in most)


def main() -> int:
    total, report = Counter(), []
    for name, (threads, command) in PARTS.items():
        print(
            f'--- {name}: {" ".join(command[1:] if command[0] == sys.executable else command)}',
            flush=True,
        )
        start = time.monotonic()
        code, lines = run(command, threads)
        o, slow = outcome(name, code, lines), longest(lines)
        total += o.counts
        report += [
            f'{name:<8} {clock(time.monotonic() - start):>9}   {o.said}',
            *(f'{"":21}failed: {f}' for f in o.failed),
            *([f'{"":21}longest: {slow}'] if slow else []),
        ]
    print('\n--- in all', *report, sep='\n')
    print(
        ', '.join(
            f'{total[k]} {k}' for k in ('passed', 'failed', 'skipped') if k != 'skipped' or total[k]
        )
    )
    return int(total['failed'] > 0)


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
