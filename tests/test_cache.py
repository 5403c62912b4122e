"A cache of teacher answers: what is written, what is refused, and training without a teacher."
import contextlib, copy, gc, io, json, os, random, shutil, signal, subprocess, sys, tarfile, weakref
from pathlib import Path
import open_clip, pytest, torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load
from test_distill import Pairs, different, when
from shards import shard
from tinyclip import cache as cache_module, cli
from tinyclip.cache import ask_teacher, cache_size, cached_already, write_cache, write_shards
from tinyclip.cached import CachedBatch, cached_pairs
from tinyclip.fingerprints import differing, teacher_print
from tinyclip.cli import main
from tinyclip.core import TinyclipError
from tinyclip.data import labelled, open_pairs
from tinyclip.distill import Distiller
from tinyclip.engine import step
from tinyclip.losses import Features, Objective
from tinyclip.mix import mix
from tinyclip.shapes import Shapes
from tinyclip.sources import Order, Skip, as_source, read_shard
from tinyclip.zoo import load as load_model

TRAIN,VAL = (image_transform_v2(PreprocessCfg(size=16), is_train=t, aug_cfg=dict(scale=(.3, 1.)) if t else None) for t in (True, False))
TOKENIZER = open_clip.SimpleTokenizer(context_length=12)
def OTHER(texts, context_length=12): return TOKENIZER([t[::-1] for t in texts], context_length)
ROWS = ('teacher_image', 'teacher_text')

def clip(seed=0, width=32, dim=16):
    torch.manual_seed(seed)
    vision = dict(image_size=16, layers=1, width=width, patch_size=8, head_width=16)
    return open_clip.CLIP(dim, vision, dict(context_length=12, vocab_size=49408, width=32, heads=2, layers=1))

def picture(i):
    im = Image.radial_gradient('L').resize((40,30))
    Image.merge('RGB', [im.rotate(17*i), im.rotate(31*i+90), im.point(lambda v: (v*3+i*9)%256)]).save(b := io.BytesIO(), 'PNG')
    return b.getvalue()

def sample(i, captions=2): return dict(png=picture(i), json=json.dumps(dict(captions=[f'caption {k} of {i}' for k in range(captions)])))

@pytest.fixture
def data(tmp_path):
    for s in range(3): shard(tmp_path/'data'/f'{s}.tar', [sample(10*s+i, 1+i%3) for i in range(10)], 10*s, 'dir/')
    return str(tmp_path/'data'/'*.tar')

def written(data, folder, teacher=None, **kw): return write_cache(data, teacher or clip(), TRAIN, TOKENIZER, folder, **dict(precision='fp32', dtype='float32', views=2) | kw)
def opened(data, folder, **kw): return cached_pairs(data, folder, TRAIN, TOKENIZER, **dict(batch_size=6) | kw)
def same(a, b): return len(a)==len(b) and all(torch.equal(x, y) for p,q in zip(a, b) for x,y in zip(p, q))

# --- what is written

def test_answers_are_the_teachers_on_the_same_crops_and_captions(data, tmp_path):
    "Against the plain way: the pairs of `open_pairs` in the epoch of a view, and the teacher on them"
    written(data, tmp_path/'c')
    pairs,plain = opened(data, tmp_path/'c'),open_pairs(data, TRAIN, TOKENIZER, 6)
    for epoch in (0, 1):
        n = 0
        for a,b in zip(pairs.epoch(epoch), plain.epoch(epoch), strict=True):
            assert torch.equal(a.image, b.image) and torch.equal(a.text, b.text)
            for found,want in zip((a.teacher_image, a.teacher_text), ask_teacher(clip(), b.image[:,None], b.text)): assert (found-want.reshape(found.shape)).abs().max()<1e-6
            n += 1
        assert n==5

def test_later_epochs_show_the_views_again(data, tmp_path):
    "Epoch 2 has the crops of epoch 0, in another order and with captions of its own; rows belong to them"
    written(data, tmp_path/'c')
    crops = lambda e: {round(v, 3) for b in opened(data, tmp_path/'c').epoch(e) for v in b.image.double().sum((1, 2, 3)).tolist()}
    assert crops(0)==crops(2)!=crops(1)==crops(3)
    pairs = opened(data, tmp_path/'c')
    texts = [torch.cat([b.text for b in pairs.epoch(e)]) for e in (0, 2)]
    assert not torch.equal(*texts)
    for b in pairs.epoch(2):
        for found,want in zip((b.teacher_image, b.teacher_text), ask_teacher(clip(), b.image[:,None], b.text)): assert (found-want.reshape(found.shape)).abs().max()<1e-6

def test_crops_have_the_seed_of_the_cache_and_captions_their_own(data, tmp_path):
    written(data, tmp_path/'c', seed=5)
    pairs = opened(data, tmp_path/'c', seed=7)
    crops = lambda p: sorted(round(v, 3) for b in p.epoch(0) for v in b.image.double().sum((1, 2, 3)).tolist())
    assert crops(pairs)==crops(open_pairs(data, TRAIN, TOKENIZER, 6, seed=5))
    assert torch.equal(next(pairs.epoch(0)).text, next(open_pairs(data, TRAIN, TOKENIZER, 6, seed=7).epoch(0)).text)
    b = next(pairs.epoch(0))
    assert (ask_teacher(clip(), b.image[:,None], b.text)[0][:,0]-b.teacher_image).abs().max()<1e-6

@pytest.mark.parametrize('dtype, off', [('float16', 1e-3), ('bfloat16', 1e-2)])
def test_half_precision_costs_its_rounding(data, tmp_path, dtype, off):
    written(data, tmp_path/'full'); small = written(data, tmp_path/'half', dtype=dtype)
    a,b = (next(opened(data, tmp_path/n).epoch(0)) for n in ('full', 'half'))
    for k in ROWS:
        x,y = getattr(a, k),getattr(b, k)
        assert 0 < (x-y).abs().max() < off and (y.norm(dim=-1)-1).abs().max()<1e-6 and y.dtype==torch.float32
    assert small['bytes'] <= sum(p.stat().st_size for p in (tmp_path/'full').glob('*.tar'))

@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_the_size_is_known_beforehand(data, tmp_path, dtype):
    said = cache_size(data, 16, views=3, dtype=dtype, look=None)
    assert said == written(data, tmp_path/'c', dtype=dtype, views=3)['bytes'] == sum(p.stat().st_size for p in (tmp_path/'c').glob('*.tar'))
    assert abs(cache_size(data, 16, views=3, dtype=dtype, look=1)-said) < .4*said

@pytest.mark.filterwarnings('ignore:.*loader workers busy|This DataLoader')
def test_workers_change_nothing(data, tmp_path):
    written(data, tmp_path/'a'); written(data, tmp_path/'b', workers=2, batch_size=4)
    for n in range(3):
        a,b = (list(read_shard(tmp_path/f/f'{n}.tar')) for f in 'ab')
        assert [r['__key__'] for r in a]==[r['__key__'] for r in b]==[f'dir/{i:04}' for i in range(10*n, 10*n+10)]
        for r,s in zip(a, b):
            r,s = load(r['safetensors']),load(s['safetensors'])
            assert all((r[k]-s[k]).abs().max()<1e-6 for k in ('image', 'text'))
    assert same(list(opened(data, tmp_path/'a').epoch(1)), list(opened(data, tmp_path/'a', workers=2).epoch(1)))

def test_the_teacher_gets_many_pictures_at_a_time(data, tmp_path):
    for size,want in ((8, [8, 8, 4]), (256, [20])):
        teacher,seen = clip(),[]
        plain = teacher.encode_image
        teacher.encode_image = lambda x: (seen.append(len(x)), plain(x))[1]
        written(data, tmp_path/str(size), teacher, batch_size=size)
        assert seen==want*3

WORKER = '''
import sys; sys.path.insert(0, {here!r})
from test_cache import *
with open(Path({folder!r})/f"said-{{os.environ['RANK']}}.json", 'w') as f, contextlib.redirect_stdout(f): sys.exit(main({argv!r}))
'''

def test_two_processes_write_what_one_writes(data, tmp_path, capsys):
    "As `torchrun -m tinyclip cache` does: each takes its share, and together the files are those of one process"
    argv = lambda out: ['cache', '--data', data, '--teacher', 'shapes-teacher', '--out', str(tmp_path/out), '--views', '2', '--device', 'cpu', '--precision', 'fp32', '--dtype', 'float32', '--json']
    assert main(argv('one'))==0
    alone = json.loads(capsys.readouterr().out)
    (tmp_path/'worker.py').write_text(WORKER.format(here=str(Path(__file__).parent), folder=str(tmp_path), argv=argv('two')))
    out = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(tmp_path/'worker.py')], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'), timeout=300)
    assert out.returncode==0, out.stderr[-3000:]
    said = [json.loads((tmp_path/f'said-{r}.json').read_text()) for r in (0, 1)]
    assert [(s['process'], s['of'], s['shards'], s['found']) for s in said]==[(0, 2, 2, 0), (1, 2, 1, 0)]
    assert all(sum(s[k] for s in said)==alone[k] for k in ('samples', 'captions', 'bytes'))
    files = lambda out: sorted(p.name for p in (tmp_path/out).iterdir())
    assert files('one')==files('two')
    for name in files('one'):
        if name.endswith('json'): assert (tmp_path/'one'/name).read_bytes()==(tmp_path/'two'/name).read_bytes(); continue
        a,b = (list(read_shard(tmp_path/out/name)) for out in ('one', 'two'))
        assert [r['__key__'] for r in a]==[r['__key__'] for r in b] and len(a)==10
        for r,s in zip(a, b):
            r,s = load(r['safetensors']),load(s['safetensors'])
            assert all((r[k]-s[k]).abs().max()<1e-5 for k in ('image', 'text'))

# --- interrupted, broken

def test_goes_on_where_it_stopped(data, tmp_path):
    class Stop(Exception): pass
    def stop(r):
        if r['shard']=='1.tar': raise Stop
    with pytest.raises(Stop): written(data, tmp_path/'c', told=stop)
    before = {p.name:p.stat().st_mtime_ns for p in (tmp_path/'c').glob('*.tar')}
    assert set(before)=={'0.tar', '1.tar'}
    with pytest.raises(TinyclipError, match="no answers for the shard '2.tar'"): opened(data, tmp_path/'c')
    r = written(data, tmp_path/'c')
    assert (r['found'], r['shards'], r['samples'], r['captions'])==(2, 3, 30, sum(1+i%3 for i in range(10))*3)
    assert all((tmp_path/'c'/n).stat().st_mtime_ns==t for n,t in before.items())

def killed_at(moment, write, folder): # in a child, at this file operation, tar member or question to the teacher; returns how many there were, None if it was killed
    read,said = os.pipe()
    if not (pid := os.fork()):
        signal.alarm(60); torch.set_num_threads(1)
        n = [0]
        def tick(*_):
            n[0] += 1
            if n[0]==moment: os.kill(os.getpid(), signal.SIGKILL)
        def before(f): return lambda *a, **kw: (tick(), f(*a, **kw))[1]
        teacher = clip()
        teacher.encode_image,tarfile.TarFile.addfile = before(teacher.encode_image), before(tarfile.TarFile.addfile)
        sys.addaudithook(lambda event, args: event in ('open', 'os.rename', 'os.remove', 'os.chmod') and str(folder) in str(args[0]) and tick())
        with contextlib.suppress(BaseException): write(teacher); os.write(said, str(n[0]).encode())
        os._exit(0)
    os.close(said)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(read) as f: told = f.read()
    assert told or os.WTERMSIG(status)==signal.SIGKILL
    return int(told) if told else None

@pytest.mark.filterwarnings('ignore:.*fork')
def test_kills_at_any_moment_cost_nothing(tmp_path):
    "SIGKILL twice, at random moments: nothing half-written counts, and the files in the end are those of a process that nobody disturbed"
    for s in range(3): shard(tmp_path/'data'/f'{s}.tar', [sample(5*s+i) for i in range(5)], 5*s)
    data,whole,c = str(tmp_path/'data'/'*.tar'),tmp_path/'whole',tmp_path/'c'
    held = lambda folder: {p.name:p.read_bytes() for p in folder.iterdir()}
    write = lambda teacher: written(data, c, teacher, batch_size=3)
    written(data, whole, batch_size=3)
    moments = killed_at(None, write, c)
    assert moments>40 and held(c)==held(whole)
    rng = random.Random(0)
    for moment in sorted(rng.sample(range(1, moments), 12)) + [moments]:
        shutil.rmtree(c)
        assert killed_at(moment, write, c) is None
        assert all(p.read_bytes()==(whole/p.name).read_bytes() for p in c.glob('*.tar')) # none stands half-written under its name
        done = [u for u in as_source(data).urls if cached_already(c, u)]
        with contextlib.nullcontext() if len(done)==3 else pytest.raises(TinyclipError, match='holds no cache|no answers for the shard'): opened(data, c)
        killed_at(rng.randrange(1, moments), write, c)
        assert written(data, c, batch_size=3)['found']>=len(done)
        assert held(c)==held(whole)

def test_the_record_of_other_answers_goes_first(data, tmp_path):
    "A shard that changed is asked about again; killed before its new record is there, the old one must not vouch for it when the old data come back"
    written(data, tmp_path/'c')
    one = tmp_path/'data'/'1.tar'
    old = one.read_bytes()
    shard(one, [sample(10+i, 1+i%3) for i in reversed(range(10))], 10)
    teacher = clip()
    class Stop(Exception): pass
    def stop(*_): raise Stop
    teacher.encode_image = stop
    with pytest.raises(Stop): written(data, tmp_path/'c', teacher)
    one.write_bytes(old)
    with pytest.raises(TinyclipError, match="no answers for the shard '1.tar'"): opened(data, tmp_path/'c')

def test_a_failure_within_a_shard_leaves_none_of_it(data, tmp_path):
    teacher = clip(); calls,plain = [],teacher.encode_text
    def fails(x):
        calls.append(1)
        if len(calls)>3: raise OSError('no space left')
        return plain(x)
    teacher.encode_text = fails
    with pytest.raises(OSError): written(data, tmp_path/'c', teacher, batch_size=8)
    assert not [p for p in (tmp_path/'c').iterdir() if p.name!='cache.json' and not p.name.startswith('0.tar')]

def test_broken_samples_are_left_out_and_counted(tmp_path):
    good = [sample(i) for i in range(10)]
    bad = [dict(good[0], png=b'no picture'), dict(txt='no image'), dict(png=picture(1))]
    shard(tmp_path/'data'/'0.tar', [*good[:4], bad[0], *good[4:7], bad[1], bad[2], *good[7:]])
    shard(tmp_path/'data'/'1.tar', [bad[0], bad[0]]) # nothing in it is usable
    data = str(tmp_path/'data'/'*.tar')
    r = written(data, tmp_path/'c')
    assert r['samples']==10 and r['skipped']=={'broken image':3, 'no image':1, 'no caption':1}
    pairs = opened(data, tmp_path/'c', batch_size=5)
    assert len(list(pairs.epoch(0)))==2 and dict(pairs.skipped)=={'not in the cache':3, 'no image':1, 'no caption':1}

def test_answers_that_are_no_numbers_are_left_out(data, tmp_path):
    teacher = clip(); plain = teacher.encode_image
    def odd(x): y = plain(x); y[1] = float('nan'); return y
    teacher.encode_image = odd
    r = written(data, tmp_path/'c', teacher)
    assert r['skipped']=={'teacher not finite':3} and r['samples']==27

def test_other_captions_are_noticed(data, tmp_path):
    written(data, tmp_path/'c')
    tar = tmp_path/'c'/'0.tar'
    rows = {r['__key__']:r['safetensors'] for r in read_shard(tar)}
    first,second = sorted(rows)[:2] # one caption and two: their answers change places
    rows[first],rows[second] = rows[second],rows[first]
    with tarfile.open(tar, 'w') as t:
        for k,v in rows.items(): info = tarfile.TarInfo(f'{k}.safetensors'); info.size = len(v); t.addfile(info, io.BytesIO(v))
    pairs = opened(data, tmp_path/'c', batch_size=4)
    assert len(list(pairs.epoch(0)))==7 and pairs.skipped['other captions than in the cache']==2

# --- what is refused

@pytest.mark.parametrize('change, says', [
    (dict(teacher=1), 'another teacher'), (dict(preprocess=VAL), 'another preprocess'), (dict(tokenizer=OTHER), 'another tokenizer'), (dict(tokenizer=open_clip.SimpleTokenizer(context_length=11)), 'texts of 11 tokens, and this teacher takes 12'),
    (dict(preprocess=image_transform_v2(PreprocessCfg(size=24), is_train=False)), r'images of \[24, 24\], and this teacher takes'),
    (dict(seed=1), 'seed=0, not 1'), (dict(views=1), 'views=2, not 1'), (dict(dtype='float16'), "dtype='float32', not 'float16'"), (dict(reduced=False), 'reduced=True, not False'), (dict(dtype='int8'), "no dtype of a cache named 'int8'")])
def test_a_cache_is_not_mixed_up(data, tmp_path, change, says):
    written(data, tmp_path/'c')
    kw = dict(teacher=0, preprocess=TRAIN, tokenizer=TOKENIZER, views=2, dtype='float32', precision='fp32') | change
    with pytest.raises(TinyclipError, match=says): write_cache(data, clip(kw.pop('teacher')), kw.pop('preprocess'), kw.pop('tokenizer'), tmp_path/'c', **kw)

def test_readers_must_fit(data, tmp_path):
    folder = tmp_path/'c'
    with pytest.raises(TinyclipError, match='holds no cache'): opened(data, folder)
    written(data, folder)
    for kw,says in ((dict(preprocess=VAL), 'another preprocess'), (dict(tokenizer=OTHER), 'another tokenizer')):
        with pytest.raises(TinyclipError, match=says): cached_pairs(data, folder, **dict(preprocess=TRAIN, tokenizer=TOKENIZER, batch_size=4) | kw)
    with pytest.raises(TinyclipError, match='other captions.*caption column'): opened(as_source(data, caption_column='captions'), folder)
    with pytest.raises(TinyclipError, match='another teacher'): opened(data, folder, teacher=clip(1))
    opened(data, folder, teacher=clip())
    opened(str(tmp_path/'data'/'1.tar'), folder) # some of the shards
    with pytest.raises(TinyclipError, match='batch_size=0'): opened(data, folder, batch_size=0)
    with pytest.raises(TinyclipError, match='Only webdataset shards'): opened('shapes', folder)
    with pytest.raises(TinyclipError, match='Only webdataset shards'): opened(mix({data:1}), folder)

def test_shards_must_be_the_same(data, tmp_path):
    folder,one = tmp_path/'c',tmp_path/'data'/'1.tar'
    written(data, folder)
    size = one.stat().st_size
    shard(one, [sample(10+i, 1+i%3) for i in reversed(range(10))], 10)
    assert one.stat().st_size==size
    with pytest.raises(TinyclipError, match="'1.tar' is not the one"): opened(data, folder)
    assert written(data, folder)['found']==2 # asks again about this one
    opened(data, folder)
    (folder/'2.tar').write_bytes((folder/'2.tar').read_bytes()[:-512])
    with pytest.raises(TinyclipError, match="'2.tar'.*damaged"): opened(data, folder)
    shutil.copytree(tmp_path/'data', tmp_path/'again')
    with pytest.raises(TinyclipError, match='names more than one shard'): opened([data, str(tmp_path/'again'/'*.tar')], folder)
    with pytest.raises(TinyclipError, match='a folder of its own'): written(data, tmp_path/'data')

def test_prints_tell_models_and_transforms_apart():
    assert teacher_print(clip())==teacher_print(copy.deepcopy(clip()))!=teacher_print(clip(1))
    half = clip().half()
    assert teacher_print(half)==teacher_print(copy.deepcopy(half))!=teacher_print(clip())
    of = lambda t: cache_module.transform_print(t)
    here = lambda a,b: differing(dict(p=of(a)), dict(p=of(b)))
    brighter = lambda im: TRAIN(im)+.5
    assert here(TRAIN, image_transform_v2(PreprocessCfg(size=16), is_train=True, aug_cfg=dict(scale=(.3, 1.)))) is None
    assert here(TRAIN, image_transform_v2(PreprocessCfg(size=16), is_train=True))=='p'
    assert here(lambda im: TRAIN(im), brighter)=='p' # both say that they are a function

# --- several teachers

def second(dim=24, scale=40.): # another width, another temperature
    teacher = clip(1, 48, dim)
    teacher.logit_scale.data.fill_(scale).log_()
    return teacher

def test_several_teachers_agree_by_their_mean_logits(data, tmp_path):
    "Against live teachers and a loss written down in float64: own temperatures and a fixed one, whole and in tiles"
    teachers = clip(),second()
    for t,name in zip(teachers, 'ab'): written(data, tmp_path/name, t)
    pairs = opened(data, [tmp_path/'a', tmp_path/'b'])
    for epoch in (0, 1):
        batch = next(pairs.epoch(epoch))
        plain = next(open_pairs(data, TRAIN, TOKENIZER, 6).epoch(epoch))
        assert torch.equal(batch.image, plain.image) and torch.equal(batch.text, plain.text) and batch.teacher_image.shape==batch.teacher_text.shape==(6, 40)
        for k in ROWS: assert (getattr(batch, k).norm(dim=1)-1).abs().max()<1e-6
        with torch.no_grad(): live = [(t.logit_scale.exp().double(), F.normalize(t.encode_image(plain.image).double(), dim=1) @ F.normalize(t.encode_text(plain.text).double(), dim=1).T) for t in teachers]
        student = Features(*(F.normalize(torch.randn(6, 12), dim=1) for _ in 'it'), 50.)
        theirs = Features(batch.teacher_image, batch.teacher_text, batch.teacher_scale)
        mean,total = sum(s*c for s,c in live)/2, sum(s for s,_ in live)
        for scale,logits in (('own', mean), (50., 50*sum(s/total*c for s,c in live))):
            own = 50*(student.image.double() @ student.text.double().T)
            want = sum(-(t.softmax(1)*s.log_softmax(1)).sum(1).mean() for s,t in ((own, logits), (own.T, logits.T)))
            for tile in (None, 4): assert abs(Objective(teacher_scale=scale, tile=tile)(student, theirs)['loss']-want)<1e-5*want
        geometric = F.normalize(((live[0][0]*live[0][1]).softmax(1)*(live[1][0]*live[1][1]).softmax(1)).sqrt(), p=1, dim=1)
        assert ((batch.teacher_scale*batch.teacher_image @ batch.teacher_text.T).softmax(1)-geometric).abs().max()<1e-5

def test_one_teacher_in_a_list_is_one_teacher(data, tmp_path):
    written(data, tmp_path/'a')
    a,b = opened(data, tmp_path/'a'),opened(data, [tmp_path/'a'])
    assert a.teacher==b.teacher and same(list(a.epoch(0)), list(b.epoch(0)))

def test_several_caches_must_fit(data, tmp_path):
    a,b = tmp_path/'a',tmp_path/'b'
    written(data, a); written(data, b, second())
    both = opened(data, [a, b], teacher=second())
    with pytest.raises(TinyclipError, match='another teacher'): opened(data, [a, b], teacher=clip(5))
    with pytest.raises(TinyclipError, match='empty list'): opened(data, [])
    with pytest.raises(TinyclipError, match='same teacher'): opened(data, [a, b, str(a)])
    for kw,says in ((dict(views=3), 'views=2 and views=3'), (dict(seed=1), 'seed=0 and seed=1')):
        written(data, tmp_path/says, clip(2), **kw)
        with pytest.raises(TinyclipError, match=f'of other crops, {says}'): opened(data, [a, tmp_path/says])
    write_cache(data, clip(2), VAL, TOKENIZER, tmp_path/'val', precision='fp32', views=2)
    with pytest.raises(TinyclipError, match="'.*val' was made with another preprocess"): opened(data, [a, tmp_path/'val'])
    nan = clip(2); plain = nan.encode_image
    def odd(x): y = plain(x); y[2] = float('nan'); return y
    nan.encode_image = odd
    written(data, tmp_path/'holes', nan, views=2)
    pairs = opened(data, [a, tmp_path/'holes', b], batch_size=9)
    assert len(list(pairs.epoch(0)))==3 and pairs.skipped=={'not in the cache':3}
    assert next(pairs.epoch(1)).teacher_image.shape==(9, 56)
    (b/'2.tar.json').unlink()
    with pytest.raises(TinyclipError, match=f"'.*b' has no answers for the shard '2.tar'"): opened(data, [a, b])
    assert both.teacher['parameters'][0]!=both.teacher['parameters'][1]

def test_a_run_with_several_teachers_resumes_to_the_bit(data, tmp_path):
    written(data, tmp_path/'a', dtype='float16'); written(data, tmp_path/'b', second(), dtype='bfloat16')
    both = lambda: opened(data, [tmp_path/'a', tmp_path/'b'])
    whole = job(both()).fit(8).student
    with pytest.raises(KeyboardInterrupt): job(both(), folder=tmp_path/'run', listeners=[when('log', 5, lambda: signal.raise_signal(signal.SIGINT))]).fit(8)
    assert not different(whole, job(both(), folder=tmp_path/'run', student=clip(4)).fit(8, resume=True).student)
    with pytest.raises(TinyclipError, match='belongs to another run: cache is'): job(opened(data, tmp_path/'a'), folder=tmp_path/'run').fit(8, resume=True)
    with pytest.raises(TinyclipError, match="'feature' compares features of the student .width 16. with features of the teacher .width 40."): job(both(), objective='feature').fit(1)

# --- other sources

def entries(source): return {(tuple(s.captions), s.label, s.image if isinstance(s.image, bytes) else Path(s.image).read_bytes()) for c in as_source(source).chunks(Order(shuffle=False)) for s in c if not isinstance(s, Skip)}

def test_tables_and_folders_become_shards(tmp_path):
    for i in range(12):
        file = tmp_path/'things'/f'{"ab"[i%2]}_class'/f'{i}.v1.png'
        file.parent.mkdir(parents=True, exist_ok=True); file.write_bytes(picture(i))
    (tmp_path/'things'/'a_class'/'broken.jpg').write_bytes(b'no picture')
    rows = [f'things/{"ab"[i%2]}_class/{i}.v1.png,caption {k} of {i}' for i in range(12) for k in range(1+i%2)]
    (tmp_path/'pairs.csv').write_text('\n'.join(['image,caption', *rows, 'things/gone.png,nothing']))
    for source,left_out in (('pairs.csv', {'missing image':1}), ('things', {'broken image':1})):
        out = tmp_path/f'{source}-shards'
        assert write_shards(tmp_path/source, out, each=5)==dict(shards=3, samples=12, skipped=left_out)
        assert entries(str(out/'*.tar'))=={e for e in entries(tmp_path/source) if e[2]!=b'no picture'}
        written(str(out/'*.tar'), tmp_path/f'{source}-cache')
        assert len(list(opened(str(out/'*.tar'), tmp_path/f'{source}-cache').epoch(0)))==2
        with pytest.raises(TinyclipError, match='Only webdataset shards.*tinyclip.cache.write_shards'): opened(str(tmp_path/source), tmp_path/f'{source}-cache')
        with pytest.raises(TinyclipError, match='holds something already'): write_shards(tmp_path/source, out)
    order = [s.captions[0] for s in as_source(str(tmp_path/'things-shards'/'*.tar')).samples(as_source(str(tmp_path/'things-shards'/'*.tar')).urls)]
    assert order!=sorted(order) # classes are mixed
    assert labelled(str(tmp_path/'things-shards'/'*.tar'), VAL, 4).source.classnames==['a class', 'b class']

def test_mixes_and_drawings_become_shards(data, tmp_path):
    "An epoch of a mix: a picture that comes twice is two samples; drawn ones are kept to the pixel"
    assert write_shards(mix([(data, 1), (data, 3)], length=48), tmp_path/'mixed')['samples']==48
    assert entries(str(tmp_path/'mixed'/'*.tar'))<=entries(data) and len(entries(str(tmp_path/'mixed'/'*.tar')))>=25
    write_shards(Shapes('train', n=8), tmp_path/'drawn')
    pixels = lambda s: sorted(round(v, 3) for b in open_pairs(s, VAL, TOKENIZER, 8).epoch(0) for v in b.image.double().abs().sum((1, 2, 3)).tolist())
    assert pixels(str(tmp_path/'drawn'/'*.tar'))==pixels(Shapes('train', n=8))

def test_half_written_shards_are_not_left(data, tmp_path, monkeypatch):
    plain,calls = tarfile.TarFile.addfile,[]
    def full(*a): calls.append(1); (_ for _ in ()).throw(OSError('no space left')) if len(calls)>9 else None; return plain(*a)
    monkeypatch.setattr(tarfile.TarFile, 'addfile', full)
    with pytest.raises(OSError): write_shards(data, tmp_path/'out', each=4)
    assert {p.name for p in tmp_path.iterdir()}=={'data'}
    (tmp_path/'none').mkdir(); (tmp_path/'none'/'x.csv').write_text('image,caption\ngone.png,nothing')
    with pytest.raises(TinyclipError, match='holds nothing to write'): write_shards(tmp_path/'none'/'x.csv', tmp_path/'out')
    with pytest.raises(TinyclipError, match='each=0'): write_shards(data, tmp_path/'out', each=0)
    assert not (tmp_path/'out').exists()

# --- training

def test_a_step_is_the_step_with_the_teacher(data, tmp_path):
    "Losses and gradients, with an objective that looks at the teacher's own temperature"
    written(data, tmp_path/'c'); written(data, tmp_path/'h', dtype='float16')
    objective = Objective(['affinity', 'contrastive'], teacher_scale='own')
    def taken(batch, teacher):
        student = clip(3)
        losses = step(student, teacher, batch, objective)
        losses['loss'].backward()
        return {k:v.item() for k,v in losses.items()}, [p.grad for p in student.parameters() if p.grad is not None]
    want,grads = taken(next(open_pairs(data, TRAIN, TOKENIZER, 6).epoch(0)), clip())
    for folder,off in (('c', 1e-6), ('h', 1e-3)):
        found,g = taken(next(opened(data, tmp_path/folder).epoch(0)), None)
        assert set(found)==set(want) and all(abs(found[k]-want[k])<off*max(1, abs(want[k])) for k in want)
        assert all((a-b).norm()<=10*off*b.norm()+1e-6 for a,b in zip(g, grads))
    own = CachedBatch(*next(open_pairs(data, TRAIN, TOKENIZER, 6).epoch(0)), *(f.reshape(6, -1) for f in ask_teacher(clip(), *(lambda b: (b.image[:,None], b.text))(next(open_pairs(data, TRAIN, TOKENIZER, 6).epoch(0))))), clip().logit_scale.exp().detach())
    assert taken(own, None)[0]==want # asked with the same batch: to the bit

def job(pairs, teacher=None, student=None, **kw): return Distiller(student or clip(3), teacher, pairs, **dict(lr=1e-3, log_every=1, device='cpu', precision='fp32', progress=False) | kw)

def test_a_run_without_a_teacher_is_the_run_with_one(data, tmp_path):
    written(data, tmp_path/'c')
    live,cached = ([], [])
    job(open_pairs(data, TRAIN, TOKENIZER, 6), clip(), listeners=[lambda e: e['event']=='log' and live.append(e['loss'])]).fit(4)
    teacher = clip()
    def never(*_): raise AssertionError('the teacher was run')
    teacher.encode_image = teacher.encode_text = teacher.forward = never
    job(opened(data, tmp_path/'c'), teacher, listeners=[lambda e: e['event']=='log' and cached.append(e['loss'])]).fit(4)
    assert len(live)==len(cached)==4 and max(abs(a-b) for a,b in zip(live, cached))<1e-4

def test_resumes_to_the_bit(data, tmp_path):
    written(data, tmp_path/'c', dtype='float16')
    whole = job(opened(data, tmp_path/'c')).fit(12).student
    with pytest.raises(KeyboardInterrupt): job(opened(data, tmp_path/'c'), folder=tmp_path/'run', listeners=[when('log', 7, lambda: signal.raise_signal(signal.SIGINT))]).fit(12)
    r = job(opened(data, tmp_path/'c'), folder=tmp_path/'run', student=clip(4)).fit(12, resume=True)
    assert r.steps==12 and not different(whole, r.student)
    written(data, tmp_path/'other', clip(1))
    with pytest.raises(TinyclipError, match='belongs to another run: cache is'): job(opened(data, tmp_path/'other'), folder=tmp_path/'run').fit(12, resume=True)

def test_refusals(data, tmp_path):
    written(data, tmp_path/'c')
    with pytest.raises(TinyclipError, match='another teacher'): job(opened(data, tmp_path/'c'), clip(1))
    with pytest.raises(TinyclipError, match='teacher=None'): job(open_pairs(data, TRAIN, TOKENIZER, 6))
    assert job(Pairs(size=16), None, objective='contrastive').teacher is None

def test_command_line(tmp_path, capsys):
    teacher,_,_ = load_model('shapes-teacher')
    shard(tmp_path/'data'/'0.tar', [sample(i) for i in range(12)])
    where = ['--data', str(tmp_path/'data'/'*.tar'), '--teacher', 'shapes-teacher', '--batch-size', '4']
    assert main(['cache', *where, '--out', str(tmp_path/'c'), '--views', '2'])==0
    out,err = capsys.readouterr()
    assert err.startswith('About 20.5 kB for 1 shards') and 'are free there' in err and '0.tar: 12 samples, 20.5 kB' in err
    assert main(['cache', *where, '--out', str(tmp_path/'c'), '--views', '2', '--json'])==0
    r = json.loads(capsys.readouterr().out)
    assert (r['found'], r['samples'], r['captions'])==(1, 12, 24) and r['bytes']==r['estimate']
    train = ['distill', *where, '--image-width', '.5', '--steps', '3', '--cache', str(tmp_path/'c'), '--out', str(tmp_path/'run'), '--json']
    assert main(train)==0
    assert json.loads(capsys.readouterr().out)['losses']['affinity']>0
    assert main([*train[:-2], str(tmp_path/'run2'), '--cache', str(tmp_path/'nothing')])==2
    assert 'holds no cache' in capsys.readouterr().err
    student = str(tmp_path/'run'/'student')
    assert main(['cache', *where, '--teacher', student, '--out', str(tmp_path/'d'), '--views', '2'])==0 # it teaches, too
    assert main([*train[:-2], str(tmp_path/'run3'), '--cache', str(tmp_path/'d'), '--json'])==0
    assert json.loads((tmp_path/'run3'/'result.json').read_text())['arguments']['cache']==[str(tmp_path/n) for n in 'cd']
    assert len(next(map(json.loads, (tmp_path/'run3'/'events.jsonl').read_text().splitlines()))['cache']['teacher'])==2

def test_a_teacher_that_answered_is_let_go(tmp_path, monkeypatch):
    "The student inherits and the fingerprint is compared; then nothing holds the teacher any more"
    shard(tmp_path/'data'/'0.tar', [sample(i) for i in range(8)])
    where = ['--data', str(tmp_path/'data'/'*.tar'), '--batch-size', '4']
    held,there = [],[]
    def watched(*a): loaded = load_model(*a); held.append(weakref.ref(loaded.model)); return loaded
    class Looks(Distiller):
        def fit(self, *a, **kw): gc.collect(); there.append(held[-1]() is not None); return super().fit(*a, **kw)
    monkeypatch.setattr(cli, 'load', watched); monkeypatch.setattr(cli, 'Distiller', Looks)
    assert main(['cache', *where, '--teacher', 'shapes-teacher', '--out', str(tmp_path/'c'), '--json'])==0
    train = ['distill', *where, '--teacher', 'shapes-teacher', '--image-width', '.5', '--steps', '1', '--json']
    assert main([*train, '--out', str(tmp_path/'live')])==main([*train, '--cache', str(tmp_path/'c'), '--out', str(tmp_path/'cached')])==0
    assert there==[True, False]
    assert json.loads((tmp_path/'cached'/'result.json').read_text())['losses']['affinity']>0

@pytest.mark.parametrize('text', ['', '[]', '{}', '{"shard": 3}', 'null', '{"teacher": 1}'])
def test_damaged_records_are_named(data, tmp_path, text):
    "A record beside a shard that says nothing sound is none; an index that lacks something is damaged"
    written(data, tmp_path/'c')
    record = sorted((tmp_path/'c').glob('*.tar.json'))[0]
    whole = record.read_text()
    record.write_text(text)
    with pytest.raises(TinyclipError, match='no answers for the shard|are damaged'): opened(data, tmp_path/'c')
    assert written(data, tmp_path/'c')['found']==2 # asked again about this one
    opened(data, tmp_path/'c')
    assert record.read_text()==whole
    (tmp_path/'c'/'cache.json').write_text(text)
    with pytest.raises(TinyclipError, match='is damaged'): opened(data, tmp_path/'c')

def test_damaged_answers_are_skipped(data, tmp_path):
    "Rows that are no safetensors: the sample is left out and counted, the others are used"
    written(data, tmp_path/'c')
    path = sorted((tmp_path/'c').glob('*.tar'))[0]
    raw = bytearray(path.read_bytes())
    raw[512:520] = b'\xff'*8 # the length of the first header
    path.write_bytes(raw)
    pairs = opened(data, tmp_path/'c')
    assert sum(len(b.image) for b in pairs.epoch(0))==24 and dict(pairs.skipped)=={'damaged answers':1} # 29 in batches of 6
