"""What a run needs is there before its first step, and what it was asked for is what it does:
provenance, configurations, inputs of student and teacher, and the student's way to disk"""

import copy
import json
import os
import re
import shutil
import subprocess

import open_clip
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

import tinyclip
from tinyclip.cli.main import main
from tinyclip.cli.train import from_config
from tinyclip.comparison import Comparison, by_rule
from tinyclip.core import TinyclipError, environment
from tinyclip.data import open_pairs
from tinyclip.data.cache import write_cache, write_shards
from tinyclip.data.shapes import Shapes
from tinyclip.data.transforms import transforms
from tinyclip.distill import Distiller
from tinyclip.inheritance import inherit
from tinyclip.keep import choose
from tinyclip.stages import Stage, Stages
from tinyclip.towers.architecture import architecture, build
from tinyclip.zoo import load
from tinyclip.zoo.folders import finish
from tinyclip.zoo.vocabulary import shorten

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


# what student, teacher and pairs expect of a batch


def stated(model, **pre):
    "The model, with constants of its own and CLIP's tokenizer"
    return finish(model, architecture(model), pre).model


def pairs_for(model, tokenizer=None):
    tokenizer = tokenizer or open_clip.SimpleTokenizer(context_length=model.context_length)
    return open_pairs(Shapes('train', n=16), transforms(model)[0], tokenizer, batch_size=8)


SIGLIP = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    'pre,says',
    [
        (SIGLIP, r'mean of the pixels is \(0.4815, .* for the student and \(0.5, 0.5, 0.5\)'),
        (dict(mean=[0, 0, 0], std=[1, 1, 1]), r'mean of the pixels .* \(0.0, 0.0, 0.0\)'),
        (dict(std=(0.229, 0.224, 0.225)), r'deviation of the pixels .*0.229, 0.224, 0.225'),
        (dict(interpolation='bilinear'), 'interpolation is bicubic for the student and bilinear'),
    ],
    ids=['siglip', 'mobileclip', 'imagenet', 'bilinear'],
)
def test_a_teacher_that_wants_other_pixels(tmp_path, pre, says):
    student, teacher = stated(build(TINY)), stated(build(TINY), **pre)
    with pytest.raises(TinyclipError, match=says):
        Distiller(student, teacher, ())
    if 'interpolation' not in pre:  # every crop for training is bicubic
        with pytest.raises(TinyclipError, match='in the pairs'):
            Distiller(build(TINY), teacher, pairs_for(student))
        with pytest.raises(TinyclipError, match='from this transform'):
            shards = write_shards(Shapes('train', n=4), tmp_path / 'data')
            assert shards['samples'] == 4
            source = str(tmp_path / 'data' / '00000.tar')
            tokenizer = open_clip.SimpleTokenizer(context_length=12)
            write_cache(source, teacher, transforms(student)[0], tokenizer, tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()


def test_a_teacher_that_wants_the_same_pixels_in_other_words():
    student = stated(build(TINY), mean=[0.48145466, 0.4578275, 0.40821073])
    teacher = stated(build(TINY), resize_mode='squash')  # of no crop for training
    Distiller(student, teacher, pairs_for(student))
    Distiller(build(TINY), teacher, pairs_for(student))  # a student that states nothing
    Distiller(student, build(TINY), ())


def test_a_teacher_with_another_tokenizer():
    "Two BPEs of one size, and the same model read by either"
    one, own = shorten(stated(build(TINY)), ['bird'])
    for word, says in (('fish', 'first merge .* for the student'), ('dogs', "text 'Two dogs, ")):
        other, _ = shorten(stated(build(TINY)), [word])
        assert one.vocab_size == other.vocab_size
        with pytest.raises(TinyclipError, match=says):
            Distiller(one, other, ())
    Distiller(one, inherit(one, choose(one, {'text.layers': 1})), pairs_for(one, own))
    with pytest.raises(TinyclipError, match='in the pairs .* for the student. Open the pairs'):
        Distiller(one, None, pairs_for(one), objective='contrastive')


def test_stages_and_comparisons_refuse_before_their_first_step(tmp_path):
    teacher = stated(build(TINY), **SIGLIP)
    wrong = pairs_for(build(TINY))
    with pytest.raises(TinyclipError, match='in the pairs .* for the student'):
        Stages(teacher, wrong, [Stage(0.5, 1, 1)], tmp_path / 'stages')
    job = Comparison(dict(rule=by_rule(0.5, 1)), teacher, lambda: wrong, tmp_path / 'c')
    with pytest.raises(TinyclipError, match='in the pairs .* for the student'):
        job.fit()
    assert not list(tmp_path.rglob('events.jsonl'))


def test_tokens_that_the_student_has_no_rows_for():
    student = build(changed(TINY, text_cfg__vocab_size=600))
    job = Distiller(student, None, pairs_for(student), objective='contrastive', progress=False)
    with pytest.raises(TinyclipError, match='hold token 49407, and the student has 600 tokens'):
        job.fit(1)


# a student by its configuration, without a teacher


def words_tokenizer(folder, n=600):
    "A tokenizer of transformers: w0, w1, ... are tokens 2, 3, ..."
    vocab = {w: i for i, w in enumerate(['[PAD]', '[UNK]', *(f'w{i}' for i in range(n - 2))])}
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='[UNK]'))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=t, pad_token='[PAD]', unk_token='[UNK]')
    fast.save_pretrained(folder)
    return str(folder)


def distil(cfg, folder, *argv, out='out'):
    "Exit code of `tinyclip distill --student FILE`"
    file = folder / 'student.json'
    file.write_text(json.dumps(cfg))
    argv = ['--student', file, '--data', 'shapes', '--steps', 1, '--batch-size', 8, *argv]
    argv += ['--device', 'cpu', '--json', '--out', folder / out]
    return main(['distill', *map(str, argv)])


def test_the_tokenizer_that_a_configuration_names(tmp_path):
    name = words_tokenizer(tmp_path / 'tokenizer')
    cfg = changed(TINY, text_cfg__vocab_size=600, text_cfg__hf_tokenizer_name=name)
    assert distil(cfg, tmp_path) == 0
    again = load(tmp_path / 'out' / 'student')
    assert again.tokenizer(['w5 w6'])[0, :3].tolist() == [7, 8, 0]
    # its own description beside its tokenizer, which may have moved
    shutil.rmtree(tmp_path / 'tokenizer')
    student = from_config(str(tmp_path / 'out' / 'student' / 'open_clip_config.json'))
    assert student.tokenizer(['w5 w6'])[0, :3].tolist() == [7, 8, 0]


def test_options_of_clips_own_tokenizer(tmp_path):
    "They are part of the configuration, and a folder with them needs no files"
    cfg = changed(TINY, text_cfg__tokenizer_kwargs=dict(clean='canonicalize'))
    assert distil(cfg, tmp_path) == 0
    clean = load(tmp_path / 'out' / 'student').tokenizer
    plain = open_clip.SimpleTokenizer(context_length=12)
    assert torch.equal(clean(['Dogs, cats!']), plain(['dogs cats']))
    assert not torch.equal(plain(['Dogs, cats!']), plain(['dogs cats']))


def test_constants_that_a_configuration_names(tmp_path):
    cfg = dict(model_cfg=TINY, preprocess_cfg=dict(SIGLIP, resize_mode='squash'))
    assert distil(cfg, tmp_path) == 0
    saved = json.loads((tmp_path / 'out' / 'student' / 'open_clip_config.json').read_text())
    assert saved['preprocess_cfg']['mean'] == [0.5] * 3
    assert saved['preprocess_cfg']['resize_mode'] == 'squash'


@pytest.mark.parametrize(
    'cfg,says',
    [
        (changed(TINY, text_cfg__vocab_size=1000), 'vocab_size of 1000, and its tokenizer makes'),
        (changed(TINY, text_cfg__hf_tokenizer_name='./nowhere'), 'tokenizer .* cannot be read'),
        (changed(TINY, vision_cfg__attentional_pool='cascade'), 'pools by attention twice'),
        (changed(TINY, vision_cfg__pool_type='none'), 'does not pool'),
        (changed(TINY, text_cfg__embed_cls=True), 'cannot be saved: positional_embedding'),
        (changed(TINY, vision_cfg__qk_norm=True), 'neither cut nor saved'),
    ],
    ids=['vocabulary', 'tokenizer', 'attention', 'no pooling', 'class token', 'blocks'],
)
def test_a_student_that_cannot_be_kept_is_not_trained(tmp_path, capsys, cfg, says):
    assert distil(cfg, tmp_path) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / 'out').exists()


def test_constants_beside_a_teacher(tmp_path, capsys):
    cfg = dict(model_cfg=architecture(load('shapes-teacher').model), preprocess_cfg=SIGLIP)
    assert distil(cfg, tmp_path, '--teacher', 'shapes-teacher') == 2
    assert re.search(r'\(0.5, 0.5, 0.5\) in .* for the teacher', capsys.readouterr().err)
    assert distil(cfg | dict(preprocess_cfg={}), tmp_path, '--teacher', 'shapes-teacher') == 0


# what the end of a run needs


def test_a_place_for_the_student(tmp_path, capsys):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'student').write_text('a note')
    assert distil(TINY, tmp_path) == 2
    assert "student' is a file" in capsys.readouterr().err
    assert os.listdir(tmp_path / 'out') == ['student']


@pytest.mark.parametrize(
    'given,says',
    [
        (['--eval-data', 'pairs.csv'], 'Nothing usable'),
        (['--eval-data', 'shapes', '--templates', 'opanai'], "Did you mean 'openai'"),
    ],
)
def test_an_evaluation_that_would_fail_in_the_end(tmp_path, monkeypatch, capsys, given, says):
    (tmp_path / 'pairs.csv').write_text('image,caption\ngone.jpg,a word\n')
    monkeypatch.chdir(tmp_path)
    assert distil(TINY, tmp_path, *given) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_an_evaluation_that_fails_in_the_end_leaves_the_steps(tmp_path):
    def bad(model):
        raise KeyError('top1')

    student = build(TINY)
    job = Distiller(
        student, None, pairs_for(student), objective='contrastive', folder=tmp_path, evaluate=bad
    )
    with pytest.raises(KeyError):
        job.fit(2)
    assert (tmp_path / 'checkpoint-000002').is_dir()


def test_stages_try_what_they_will_save(tmp_path):
    teacher = build(TINY)
    teacher.tokenizer_cfg = dict(hf_tokenizer_name='some/where')
    for tokenizer in (None, open_clip.SimpleTokenizer(context_length=12)):
        with pytest.raises(TinyclipError, match='Hugging Face tokenizer; pass it'):
            Stages(teacher, (), [Stage(0.5, 1, 1)], tmp_path / 's', tokenizer=tokenizer)
    (tmp_path / 's').write_text('a note')
    with pytest.raises(TinyclipError, match="s' is a file"):
        Stages(build(TINY), (), [Stage(0.5, 1, 1)], tmp_path / 's')


def test_a_run_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert distil(TINY, tmp_path) == 0
    first = json.loads((tmp_path / 'out' / 'events.jsonl').read_text().splitlines()[0])
    assert first['environment']['commit'] is None
