"""`nbdev_proc_nbs` in the present folder, with two changes: quarto is not needed (nbdev would
download it and install it with sudo), and names in backticks become links only where a module
offers them (`__all__`), since only these have a place on a page that a link can lead to."""

import ast
from functools import cache
from pathlib import Path

from nbdev import doclinks, quarto


@cache
def offered(
    module: str,  # Path of an exported module
) -> frozenset:
    "Public names of a module"
    for o in ast.parse(Path(module).read_text(encoding='utf-8')).body:
        if isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == '__all__':
            return frozenset(ast.literal_eval(o.value))
    return frozenset()


def doc(self, name):
    "Link to the documentation of a name; None where it is not public"
    found = self[name]
    if not isinstance(found, tuple):
        return found
    return found[0] if offered(found[1]) & set(name.split('.')) else None


if __name__ == '__main__':
    doclinks.NbdevLookup.doc = doc
    quarto._ensure_quarto = lambda: None
    # one process: most of the time goes into imports
    quarto.nbdev_proc_nbs.__wrapped__(n_workers=0)
