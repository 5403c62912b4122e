"""What a run needs is there before its first step, and what it was asked for is what it does:
provenance, configurations, inputs of student and teacher, and the student's way to disk"""

import copy
import json
import os
import shutil
import subprocess

import pytest

import tinyclip
from tinyclip.core import TinyclipError, environment
from tinyclip.inheritance import inherit
from tinyclip.keep import choose
from tinyclip.towers.architecture import architecture, build

TINY = dict(
    embed_dim=16,
    vision_cfg=dict(image_size=32, layers=2, width=32, patch_size=8, head_width=8),
    text_cfg=dict(context_length=12, vocab_size=49408, width=32, heads=4, layers=2),
)


def changed(cfg, **settings):
    "The configuration with other settings, `vision_cfg__width=16` for one of a part"
    cfg = copy.deepcopy(cfg)
    for name, value in settings.items():
        part, _, key = name.rpartition('__')
        (cfg[part] if part else cfg)[key] = value
    return cfg


# provenance


def repository(root, *files):
    "A git repository in which these files are tracked"
    for f in files:
        (root / f).parent.mkdir(parents=True, exist_ok=True)
        (root / f).write_text('1')
    own = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}

    def git(*a):
        who = ['-c', 'user.name=a', '-c', 'user.email=a@b.c']
        return subprocess.run(
            ['git', *who, *a], cwd=root, env=own, check=True, capture_output=True, text=True
        ).stdout.strip()

    git('init', '-q')
    git('add', *files)
    git('commit', '-qm', 'first')
    return git('rev-parse', '--short', 'HEAD')


def put(monkeypatch, folder):
    "Let the package stand in a folder"
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(tinyclip, '__path__', [str(folder)])


needs_git = pytest.mark.skipif(not shutil.which('git'), reason='no git')


@needs_git
def test_the_commit_is_that_of_the_package(monkeypatch, tmp_path):
    commit = repository(tmp_path, 'nbs/00_core.ipynb', 'tinyclip/core.py')
    put(monkeypatch, tmp_path / 'tinyclip')
    assert environment()['commit'] == commit
    (tmp_path / 'tinyclip' / 'core.py').write_text('2')
    assert environment()['commit'] == f'{commit}+changes'


@needs_git
@pytest.mark.parametrize(
    'files,where',
    [
        (['train.py'], 'venv/lib/python3/site-packages/tinyclip'),  # installed there
        (['tinyclip/core.py'], 'tinyclip'),  # copied into it
        (['tools/tinyclip/core.py'], 'tools/tinyclip'),
        (
            ['nbs/00_core.ipynb', 'tinyclip/core.py'],
            '.venv/lib/tinyclip',
        ),  # our clone, not its code
    ],
)
def test_the_commit_of_another_repository_is_not_ours(monkeypatch, tmp_path, files, where):
    repository(tmp_path, *files)
    put(monkeypatch, tmp_path / where)
    assert environment()['commit'] is None


@needs_git
def test_a_git_that_looks_elsewhere(monkeypatch, tmp_path):
    "As in a hook, or in a script that works on another repository"
    repository(tmp_path / 'other', 'nbs/00_core.ipynb')
    put(monkeypatch, tmp_path / 'own' / 'tinyclip')
    monkeypatch.setenv('GIT_DIR', str(tmp_path / 'other' / '.git'))
    assert environment()['commit'] is None


@pytest.mark.parametrize('kind', ['absent', 'fails', 'is no program'])
def test_without_git_there_is_no_commit(monkeypatch, tmp_path, kind):
    if kind != 'absent':
        (tmp_path / 'git').write_text('#!/bin/sh\necho fatal\nexit 3\n')
        (tmp_path / 'git').chmod(0o755 if kind == 'fails' else 0o644)
    monkeypatch.setenv('PATH', str(tmp_path))
    found = environment()
    assert found['commit'] is None and found['torch']


# settings of a configuration beside a teacher


@pytest.mark.parametrize(
    'settings,says',
    [
        (dict(quick_gelu=True), 'quick_gelu=True'),
        (dict(init_logit_bias=-10), 'init_logit_bias=-10'),
        (dict(nonscalar_logit_scale=True), 'nonscalar_logit_scale=True'),
        (dict(custom_text=True), 'custom_text=True'),
        (dict(vision_cfg__patch_dropout=0.25), 'patch_dropout=0.25'),
        (dict(vision_cfg__no_ln_pre=True), 'no_ln_pre=True'),
        (dict(vision_cfg__ls_init_value=0.1), 'vision_cfg.ls_init_value'),
        (dict(vision_cfg__norm_kwargs=dict(eps=1e-6)), 'norm_kwargs'),
        (dict(vision_cfg__act_kwargs=dict(approximate='tanh')), 'act_kwargs'),
        (dict(vision_cfg__head_width=16), 'head_width=16, the teacher vision_cfg.head_width=8'),
        (dict(vision_cfg__pos_embed_type='sin_cos_2d'), "pos_embed_type='sin_cos_2d'"),
        (dict(vision_cfg__final_ln_after_pool=True), 'final_ln_after_pool=True'),
        (dict(vision_cfg__image_size=[16, 64]), r'image_size=\[16, 64\]'),
        (dict(text_cfg__heads=2), 'text_cfg.width/heads=16, the teacher text_cfg.width/heads=8'),
        (dict(text_cfg__pool_type='first'), "pool_type='first'"),
        (dict(text_cfg__no_causal_mask=True), 'no_causal_mask=True'),
        (dict(text_cfg__proj_bias=True), 'proj_bias=True'),
        (dict(text_cfg__hf_tokenizer_name='other/one'), "hf_tokenizer_name='other/one'"),
        (dict(text_cfg__tokenizer_kwargs=dict(clean='canonicalize')), 'tokenizer_kwargs'),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else '',
)
def test_a_setting_that_the_teacher_does_not_have_is_refused(settings, says):
    teacher = build(TINY)
    with pytest.raises(TinyclipError, match=says):
        inherit(teacher, changed(TINY, **settings))


def test_settings_that_are_the_teachers_pass():
    for settings in (
        dict(quick_gelu=True, init_logit_bias=-8.0, vision_cfg__patch_dropout=0.5),
        dict(vision_cfg__pool_type='avg', vision_cfg__norm_kwargs=dict(eps=1e-6)),
        dict(custom_text=True, text_cfg__pool_type='last', text_cfg__no_causal_mask=True),
    ):
        cfg = changed(TINY, **settings)
        small = changed(cfg, vision_cfg__width=16, text_cfg__layers=1)
        assert architecture(inherit(build(cfg), small)) == architecture(build(small))


@pytest.mark.parametrize(
    'settings', [dict(quick_gelu=True), dict(vision_cfg__patch_dropout=0.25, custom_text=True)]
)
def test_where_a_configuration_is_silent_the_teacher_decides(settings):
    teacher = build(changed(TINY, **settings))
    with pytest.warns(UserWarning, match='silent about') as said:
        student = inherit(teacher, changed(TINY, text_cfg__layers=1))
    assert architecture(student) == changed(TINY, text_cfg__layers=1, **settings)
    assert all(k.split('__')[-1] in str(said[0].message) for k in settings)


def test_the_configuration_of_an_uneven_student():
    teacher = build(changed(TINY, vision_cfg__patch_dropout=0.5))
    first = inherit(teacher, choose(teacher, {'image.layers.1.heads': [1], 'text.layers': [1]}))
    assert first.visual.patch_dropout.prob == 0.5
    assert architecture(inherit(teacher, json.loads(json.dumps(architecture(first))))) == (
        architecture(first)
    )
