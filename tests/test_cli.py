"The command line as a shell sees it, and the real teacher on real photographs"

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinyclip.cli.main import main
from tinyclip.cli.options import COMMANDS
from tinyclip.inheritance import build
from tinyclip.towers.architecture import architecture
from tinyclip.zoo.folders import finish
from tinyclip.zoo.formats import FORMATS, Format

HELP = """import sys
from tinyclip.cli.main import main
for argv in ([], *([c] for c in sys.argv[1:])):
    try: main([*argv, '--help'])
    except SystemExit as e: assert e.code == 0
heavy = 'torch', 'numpy', 'open_clip', 'transformers', 'plotly', 'accelerate', 'PIL'
print([n for n in heavy if n in sys.modules])"""


def test_help_imports_nothing_heavy():
    r = subprocess.run([sys.executable, '-c', HELP, *COMMANDS], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert r.stdout.splitlines()[-1] == '[]'
    assert r.stdout.count('usage: tinyclip') == 1 + len(COMMANDS)


NAMES = """import importlib, sys
import tinyclip.core as core
found, read = [], core.names_in
core.names_in = lambda *where: found.append((where, read(*where))) or found[-1][1]
from tinyclip.cli.options import parser
parser()
assert 'torch' not in sys.modules
for (module, table), names in found:
    assert names == list(getattr(importlib.import_module(f'tinyclip.{module}'), table)), table
print(*sorted({table for (_, table), _ in found}))"""


def test_choices_are_those_of_the_tables():
    "They are read from the source; once the modules are imported, they are the same"
    r = subprocess.run([sys.executable, '-c', NAMES], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    tables = 'CHOOSERS DTYPES FORMS LOSSES SETS TEMPLATES'
    assert r.stdout.strip() == tables


class StateDict(Format):
    "A format that is nowhere else"

    files = {'state dict': ('clip.pt',)}
    options = dict(note=dict(help='kept in the file'))
    marker = 'clip.pt'

    def write(self, loaded, folder, note=None):
        Path(folder).mkdir()
        held = dict(cfg=architecture(loaded.model), state=loaded.model.state_dict(), note=note)
        torch.save(held, Path(folder) / 'clip.pt')
        return dict(note=note)

    def open(self, folder, form='state dict', device='cpu'):
        held = torch.load(Path(folder) / 'clip.pt', weights_only=True)
        model = build(held['cfg'])
        model.load_state_dict(held['state'])
        return finish(model.to(device).eval(), held['cfg'], {})

    def summary(self, report):
        return [f'Note: {report["note"]}']


def test_a_format_is_one_object_and_one_entry(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(FORMATS, 'state_dict', StateDict())
    out = tmp_path / 'out'
    export = ['export', 'shapes-teacher', '--out', str(out), '--note', 'mine']
    assert main([*export, '--to', 'onnx']) == 2
    assert '--note belongs to --to state_dict' in capsys.readouterr().err
    assert main([*export, '--to', 'state_dict', '--int8']) == 2 and not out.exists()
    assert '--int8 belongs to --to onnx' in capsys.readouterr().err
    assert main([*export, '--to', 'state_dict']) == 0
    assert 'Note: mine' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(['export', '--help'])
    assert 'with --to state_dict: kept in the file' in ' '.join(capsys.readouterr().out.split())
    again = tmp_path / 'again'
    assert main([*export[:3], str(again), '--to', 'state_dict', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    torch_row, row = found['rows']
    assert torch_row['form'] == 'torch' and row['form'] == 'state dict' and found['note'] is None
    assert row['difference'] == 0 and row['MB'] == (again / 'clip.pt').stat().st_size / 1e6
    assert main(['eval', str(out), 'shapes-teacher', '--data', 'shapes', '--json']) == 0
    own, first = json.loads(capsys.readouterr().out)['rows']
    assert own.pop('model') == str(out) and first.pop('model') and own == first


def test_json_goes_to_standard_output_alone():
    r = subprocess.run(
        [
            sys.executable,
            '-m',
            'tinyclip',
            'measure',
            'shapes-teacher',
            '--batch-size',
            '2',
            '--json',
        ],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout)['rows'][0]['token_table_parameters'] == 49408 * 64


@pytest.mark.parametrize(
    'argv,says',
    [
        (['eval', 'shapes-teecher', '--data', 'shapes'], "Did you mean 'shapes-teacher'"),
        (['eval', 'ViT-B-32:openia', '--data', 'shapes'], "Did you mean 'openai'"),
        (['eval', 'shapes-teacher', '--data', 'nothing-{0..3}.tar'], 'matches no file'),
        (
            [
                'distill',
                '--teacher',
                'shapes-teacher',
                '--data',
                'shapes',
                '--image-width',
                '1.5',
                '--steps',
                '1',
                '--out',
                'unused',
            ],
            'image_width=1.5',
        ),
        (
            [
                'distill',
                '--teacher',
                'shapes-teacher',
                '--data',
                'shapes',
                '--student',
                'TinyCLIP-ViT-40M-32-Text-19M',
                '--steps',
                '1',
                '--out',
                'unused',
            ],
            'patch size',
        ),
        (
            [
                'distill',
                '--teacher',
                'shapes-teacher',
                '--data',
                'shapes',
                '--steps',
                '0',
                '--out',
                'unused',
            ],
            'steps=0',
        ),
        (['measure', '.'], 'holds no model'),
    ],
)
def test_bad_input_costs_one_sentence(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith('tinyclip: ') and 'Traceback' not in err
    assert not (tmp_path / 'unused').exists()


def test_distil_a_real_teacher_resume_and_reload(shared, tmp_path, capsys):
    args = [
        'distill',
        '--teacher',
        f'{shared}/teachers/cifar10',
        '--data',
        f'{shared}/data/cifar10/train-000[01].tar',
        '--image-width',
        '.5',
        '--text-depth',
        '.5',
        '--batch-size',
        '8',
        '--out',
        str(tmp_path / 'run'),
        '--json',
        '--steps',
        '3',
    ]
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)['steps'] == 3
    assert main(args) == 2 and 'already holds a run' in capsys.readouterr().err
    assert main([*args, '--resume']) == 0  # finished: nothing left to do
    assert main(['measure', str(tmp_path / 'run' / 'student'), '--batch-size', '2', '--json']) == 0


def test_the_real_teacher_scores_what_it_is_known_to(shared, capsys):
    assert (
        main(
            [
                'eval',
                f'{shared}/teachers/cifar10',
                '--data',
                f'{shared}/data/cifar10/val-0000.tar',
                '--json',
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)['rows'][0]
    assert found['n'] == 2000 and abs(found['top1'] - 0.7195) < 0.002


def test_sigterm_leaves_a_run_to_resume(tmp_path):
    """Exit code 75, a checkpoint, and in the end the weights of a run that nobody disturbed:
    wherever the signal finds it on a busy machine, be it after the last step"""

    def command(out, *more):
        return [
            sys.executable,
            '-m',
            'tinyclip',
            'distill',
            '--teacher',
            'shapes-teacher',
            '--data',
            'shapes',
            '--image-width',
            '.5',
            '--text-depth',
            '.5',
            '--steps',
            '80',
            '--batch-size',
            '8',
            '--out',
            str(tmp_path / out),
            *more,
        ]

    run = subprocess.Popen(command('disturbed'), stderr=subprocess.PIPE, text=True)
    log = tmp_path / 'disturbed' / 'events.jsonl'
    while run.poll() is None and not (log.is_file() and '"event": "log"' in log.read_text()):
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=600)[1]
    assert (
        run.returncode == 75 and 'run the command again with --resume' in said.splitlines()[-1]
    ), said[-500:]
    stopped = max(p.name for p in (tmp_path / 'disturbed').glob('checkpoint-*'))
    assert (tmp_path / 'disturbed' / 'student').exists() == (stopped == 'checkpoint-000080')
    subprocess.run(command('disturbed', '--resume'), check=True, capture_output=True)
    subprocess.run(command('whole'), check=True, capture_output=True)
    one, two = (
        load_file(tmp_path / o / 'student' / 'open_clip_model.safetensors')
        for o in ('disturbed', 'whole')
    )
    assert all(torch.equal(one[k], two[k]) for k in two)
