"""Plotly's cartesian bundle, a third of the whole, in place of the whole one that every processed
site has: `python tools/small_plotly.py _proc`. It comes from npm, in the version that the Python
package draws for; without npm the whole one stays, and this says so."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from plotly.offline import get_plotlyjs_version

NAME = 'plotly.js-cartesian-dist-min'


def main(site: Path) -> int:
    npm = shutil.which('npm')
    if not npm:
        print(f'npm is not on PATH, so {site} keeps the whole plotly: 1.5 MB, where 0.5 would do.')
        return 0
    with tempfile.TemporaryDirectory() as tmp:
        package = f'{NAME}@{get_plotlyjs_version()}'
        done = subprocess.run(
            [npm, 'pack', '--silent', package], cwd=tmp, capture_output=True, text=True
        )
        if done.returncode:
            print(f'npm has no {package}, so {site} keeps the whole plotly. {done.stderr.strip()}')
            return 0
        with tarfile.open(next(Path(tmp).glob('*.tgz'))) as packed:
            bundle = packed.extractfile('package/plotly-cartesian.min.js').read()
    (site / 'plotly.min.js').write_bytes(bundle)
    print(f'{package}: {len(bundle) / 1e6:.1f} MB, before it is packed for the way')
    return 0


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
