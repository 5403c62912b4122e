"The command line as a shell sees it, and the real teacher on real photographs"

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tinyclip.cli.main import main


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
    while run.poll() is None and not (log.is_file() and '"log"' in log.read_text()):
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
