"""Checkpoints from strangers: whatever they hold, a model or one clear sentence comes out, and
nothing else happens"""

import gc
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tinyclip.core import TinyclipError
from tinyclip.evaluate.cost import resident
from tinyclip.inheritance import build, inherit
from tinyclip.keep import choose
from tinyclip.towers.architecture import config
from tinyclip.zoo import folders
from tinyclip.zoo import loading as zoo
from tinyclip.zoo.download import download
from tinyclip.zoo.folders import BPE, CONFIG, KEEP, WEIGHTS
from tinyclip.zoo.released import released
from tinyclip.zoo.to_transformers import to_transformers
from tinyclip.zoo.vocabulary import shorten

CFG = dict(
    embed_dim=8,
    vision_cfg=dict(image_size=8, layers=2, width=16, patch_size=4, head_width=8),
    text_cfg=dict(context_length=6, vocab_size=40, width=16, heads=2, layers=2),
)


def student():
    torch.manual_seed(0)
    teacher = build(CFG).eval()
    return inherit(
        teacher,
        choose(
            teacher,
            {'image.layers.0.heads': 1, 'image.layers.1.heads': [], 'text.layers.1.ffn': 10},
        ),
    )


# --- what may happen while a file is read: an audit hook sees every process, connection and file
# opened for writing
WATCH = dict(on=False, seen=[], room=None)


def _audit(event, args):
    if not WATCH['on']:
        return
    if event in (
        'os.system',
        'os.exec',
        'os.posix_spawn',
        'subprocess.Popen',
        'socket.connect',
        'os.mkdir',
        'os.remove',
        'os.rename',
        'shutil.rmtree',
    ):
        WATCH['seen'].append((event, str(args)[:200]))
    if (
        event == 'open'
        and isinstance(args[0], (str, bytes, os.PathLike))
        and (set(str(args[1] or '')) & set('wax+') or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    ):
        WATCH['seen'].append((event, str(args)[:200]))


sys.addaudithook(_audit)


@pytest.fixture
def watched(tmp_path):
    "Loads a path and checks that only our error comes out and that nothing happens on the way"
    count = dict(refused=0, loaded=0)
    gc.collect()  # or temporary folders of earlier tests are removed while we watch
    if os.access('/proc/self/clear_refs', os.W_OK):
        Path('/proc/self/clear_refs').write_text('5')  # the peak of this test alone
    before = resident('VmRSS')

    def attempt(path, **options):
        WATCH.update(on=True, seen=[])
        try:
            zoo.load(path, **options)
            count['loaded'] += 1
        except TinyclipError as e:
            count['refused'] += 1
            assert str(e) and '\n' not in str(e).strip()
        finally:
            WATCH['on'] = False
        assert not WATCH['seen'], (path, WATCH['seen'])

    attempt.count = count
    yield attempt
    # of which torch, transformers and timm take a part once
    assert resident('VmHWM') - before < 1.5e9


def restore(folder, clean):
    for name, data in clean.items():
        (folder / name).write_bytes(data)


def mutate(data: bytes, rng) -> bytes:
    "Truncated, with flipped bits, with a part overwritten, or with something in front"
    how, data = rng.randrange(5), bytearray(data)
    if how == 0:
        return bytes(data[: rng.randrange(len(data))])
    if how in (1, 2):
        for _ in range(1 if how == 1 else rng.randrange(1, 40)):
            data[rng.randrange(min(len(data), rng.choice([64, 4096, len(data)])))] ^= (
                1 << rng.randrange(8)
            )
        return bytes(data)
    at = rng.randrange(len(data))
    if how == 3:
        data[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    else:
        data[at:at] = struct.pack('<Q', rng.choice([0, 2**31, 2**63 - 1, 2**64 - 1]))
    return bytes(data)


NASTY = [
    None,
    True,
    -1,
    0,
    1,
    3,
    7,
    1.5,
    10**6,
    10**9,
    10**18,
    1e308,
    float('nan'),
    float('inf'),
    '',
    'x',
    '../../../etc/passwd',
    'hf-hub:some/body',
    'local-dir:/',
    '\0',
    [],
    [[]],
    [1] * 2000,
    {},
    {'a': 1},
    'vit_base_patch16_224',
    '😀',
]


def mutate_json(d, rng):
    "Replace, delete or add something anywhere"
    d = json.loads(json.dumps(d))
    spots = [(d, k) for k in d]
    for c, k in spots:  # grows while it is read
        v = c[k]
        if isinstance(v, dict):
            spots += [(v, n) for n in v]
        elif isinstance(v, list):
            spots += [(v, i) for i in range(len(v))]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        c, k = rng.choice(spots)
        try:
            if rng.random() < 0.2:
                del c[k]
            elif rng.random() < 0.2 and isinstance(c, dict):
                c[
                    rng.choice(
                        [
                            'timm_model_name',
                            'hf_model_name',
                            'hf_tokenizer_name',
                            'tokenizer_kwargs',
                            'custom_text',
                            'pool_type',
                            'tinyclip_cfg',
                            'attentional_pool',
                            'quick_gelu',
                            'layers',
                            'x',
                        ]
                    )
                ] = rng.choice(NASTY)
            else:
                c[k] = rng.choice(NASTY)
        except (KeyError, IndexError):
            pass  # the spot went with an earlier change
    return json.dumps(d)


@pytest.fixture
def room(tmp_path):
    folder = folders.save(student(), tmp_path / 'model')
    return folder, {p.name: p.read_bytes() for p in folder.iterdir()}


def test_damaged_weights(room, watched):
    folder, clean = room
    rng = random.Random(0)
    for _ in range(400):
        (folder / WEIGHTS).write_bytes(mutate(clean[WEIGHTS], rng))
        watched(folder)
    assert watched.count['refused'] > 200


def test_damaged_torch_files(tmp_path, watched):
    rng, whole = random.Random(1), io.BytesIO()
    torch.save(
        dict(
            epoch=3,
            state_dict=student().state_dict(),
            optimizer=dict(state={0: dict(step=torch.ones(1))}, param_groups=[dict(lr=1.0)]),
        ),
        whole,
    )
    (tmp_path / 'whole.pt').write_bytes(whole.getvalue())
    zoo.load(tmp_path / 'whole.pt', config=CFG)
    for _ in range(600):
        (tmp_path / 'x.pt').write_bytes(mutate(whole.getvalue(), rng))
        watched(tmp_path / 'x.pt', config=CFG)
    assert watched.count['refused'] > 300


@pytest.mark.parametrize('name,files', [(CONFIG, 700), (KEEP, 200)])
def test_damaged_json(room, watched, name, files):
    folder, clean = room
    rng, held = random.Random(name), json.loads(clean[name])
    for i in range(files):
        (folder / name).write_text(
            mutate_json(held, rng) if i % 4 else mutate(clean[name], rng).decode('latin-1'),
            encoding='utf-8',
        )
        watched(folder)
    assert watched.count['refused'] > files / 4


def test_wrong_tensors(room, watched):
    folder, clean = room
    rng, state = random.Random(4), load_file(folder / WEIGHTS)
    names = sorted(state)
    changes = [
        lambda t: t[None],
        lambda t: t.flatten()[:-1],
        lambda t: t.double().to(torch.complex64),
        lambda t: t.to(torch.int8),
        lambda t: t.bool(),
        lambda t: t.new_zeros(0),
        lambda t: torch.zeros(3, 5),
        lambda t: t.flatten(),
    ]
    for i in range(150):
        other = dict(state)
        n = rng.choice(names)
        if i % 5 == 0:
            del other[n]
        elif i % 5 == 1:
            other[
                rng.choice(
                    [
                        '../../x',
                        'visual.transformer.resblocks.999999999.attn.in_proj_weight',
                        '',
                        'x' * 5000,
                        n + '.module',
                        'module.' + n,
                    ]
                )
            ] = torch.zeros(2)
        else:
            other[n] = rng.choice(changes)(state[n]).contiguous()
        path = folder / WEIGHTS if i % 2 else folder.parent / 'bare.safetensors'
        save_file(other, path)
        watched(folder) if i % 2 else watched(path, config=CFG)
        restore(folder, clean)
    assert watched.count['refused'] > 100


class Call:
    "Pickles as a call of a function"

    def __init__(self, f, *args):
        self.f = f
        self.args = args

    def __reduce__(self):
        return self.f, self.args


def in_archive(program: bytes, path, **extra):
    "A torch archive with a pickle of our own"
    with zipfile.ZipFile(path, 'w', extra.pop('compression', zipfile.ZIP_STORED)) as z:
        for n, d in {
            'archive/data.pkl': program,
            'archive/version': b'3\n',
            'archive/byteorder': b'little',
            'archive/data/0': bytes(64),
            **extra,
        }.items():
            z.writestr(n, d)


def test_hostile_pickles(tmp_path, watched):
    mark = tmp_path / 'executed'
    calls = [
        Call(os.mkdir, str(mark)),
        Call(os.system, f'touch {mark}'),
        Call(exec, f'open({str(mark)!r}, "w")'),
        Call(eval, '1'),
        Call(open, str(mark), 'w'),
        Call(subprocess.Popen, ['touch', str(mark)]),
        Call(torch.load, str(mark)),
        Call(bytearray, 10**11),
        Call(torch.Tensor, 10**10),
        Call(getattr, 'torch', 'load'),
        Call(__import__, 'os'),
        Call(print, 'x'),
        Call(torch.zeros, 10**10),
        Call(range, 10**12),
    ]
    for call in calls:
        for protocol in range(6):
            for wrap in (
                lambda c: c,
                lambda c: dict(state_dict=dict(a=c)),
                lambda c: [c, torch.Size([3])],
            ):
                program = pickle.dumps(wrap(call), protocol=protocol)
                in_archive(program, tmp_path / 'x.pt')
                watched(tmp_path / 'x.pt', config=CFG)
                (tmp_path / 'y.pt').write_bytes(program)
                watched(tmp_path / 'y.pt', config=CFG)
    assert not mark.exists() and not watched.count['loaded']


def test_hostile_archives(tmp_path, watched):
    good = pickle.dumps(dict(a=1), protocol=2)
    in_archive(good, tmp_path / 'traversal.pt', **{'../../escaped': b'x', '/tmp/escaped': b'x'})
    in_archive(good, tmp_path / 'script.pt', **{'archive/code/x.py': b'import os'})
    in_archive(
        good,
        tmp_path / 'bomb.pt',
        compression=zipfile.ZIP_DEFLATED,
        **{'archive/data/1': bytes(10**8)},
    )
    with zipfile.ZipFile(tmp_path / 'empty.pt', 'w'):
        pass
    (tmp_path / 'not.pt').write_bytes(b'PK\x03\x04' + bytes(1000))
    for i, shape in enumerate(((10**12,), (10**6, 10**6), (10**9,))):
        torch.save(dict(a=torch.ones(1).expand(shape)), tmp_path / f'wide{i}.pt')
    torch.save(dict(a=torch.ones(1), b=3), tmp_path / 'mixed.pt')
    torch.save([1], tmp_path / 'list.pt')
    torch.save({}, tmp_path / 'none.pt')
    torch.save({3: torch.ones(1)}, tmp_path / 'number.pt')
    torch.save(dict(a=torch.ones(1)), tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    paths = sorted(tmp_path.glob('*.pt'))
    for p in paths:
        watched(p, config=CFG)
    assert watched.count == dict(refused=len(paths), loaded=0)
    assert not (tmp_path.parent / 'escaped').exists() and not Path('/tmp/escaped').exists()


def test_hostile_safetensors(tmp_path, watched):
    def written(header, body=bytes(64), length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (tmp_path / 'x.safetensors').write_bytes(
            struct.pack('<Q', len(text) if length is None else length) + text + body
        )
        watched(tmp_path / 'x.safetensors', config=CFG)

    def entry(shape, offsets, dtype='F32'):
        return dict(dtype=dtype, shape=shape, data_offsets=offsets)

    for shape in ([10**18], [2**63 - 1, 2], [-1], [4, 4, 10**9], [16]):
        for offsets in ([0, 64], [0, 10**15], [64, 0], [-8, 64], [0, 2**64 - 1]):
            written({'visual.proj': entry(shape, offsets)})
    for length in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1):
        written({'a': entry([16], [0, 64])}, length=length)
    written(b'{"a":' * 5000)
    written(b'{' + b'"a":{},' * 10000 + b'}')
    written({'../../../x': entry([16], [0, 64])})
    written({'__metadata__': {'a': 'b' * 10**6}})
    for dtype in ('F8_E4M3', 'I64', 'BOOL', 'C64', 'X'):
        written({'a': entry([16], [0, 64], dtype)})
    assert not watched.count['loaded']


def test_damaged_folders_of_transformers(tmp_path, watched):
    pytest.importorskip('transformers')
    rng, folder = random.Random(5), tmp_path / 'hub'
    to_transformers(build({**CFG, 'text_cfg': CFG['text_cfg'] | dict(vocab_size=49408)}), folder)
    clean = {
        n: (folder / n).read_bytes()
        for n in ('config.json', 'preprocessor_config.json', 'tokenizer.json', 'model.safetensors')
    }
    for i in range(120):
        name = list(clean)[i % 4]
        if name in ('config.json', 'preprocessor_config.json') and rng.random() < 0.7:
            (folder / name).write_text(mutate_json(json.loads(clean[name]), rng))
        else:
            (folder / name).write_bytes(mutate(clean[name], rng))
        watched(folder)
        restore(folder, clean)
    assert watched.count['refused'] > 50


@pytest.mark.parametrize(
    'change,said',
    [
        (dict(hf_tokenizer_name='../..'), 'cannot be made'),
        (
            dict(hf_tokenizer_name='x', tokenizer_kwargs=dict(trust_remote_code=True)),
            'runs code of its own',
        ),
    ],
)
def test_hostile_tokenizers(room, watched, change, said):
    folder, clean = room
    cfg = json.loads(clean[CONFIG])
    cfg['model_cfg']['text_cfg'] |= change
    (folder / CONFIG).write_text(json.dumps(cfg))
    with pytest.raises(TinyclipError, match=said):
        zoo.load(folder)


# --- interruption
@pytest.fixture(scope='module')
def versions():
    "Two students of the same shapes; weights, keep and vocabulary of each are its own"
    made = []
    for i, texts in enumerate((['a red circle'], ['two blue dogs'])):
        torch.manual_seed(i)
        teacher = build({**CFG, 'text_cfg': CFG['text_cfg'] | dict(vocab_size=49408)}).eval()
        made.append(
            shorten(inherit(teacher, choose(teacher, {'image.layers.0.heads': [i]})), texts)[0]
        )
    return made


def which(folder, models):
    "The model that lies in a folder, every part of it"
    got = zoo.load(folder).model
    same = [
        m.keep == got.keep
        and m.merges == got.merges
        and all(torch.equal(v, got.state_dict()[k]) for k, v in m.state_dict().items())
        for m in models
    ]
    assert sum(same) == 1
    return same.index(True)


def test_an_interrupted_save_is_not_loaded(versions, tmp_path, monkeypatch):
    "A first save that breaks off leaves nothing to load; a second one leaves the first"
    old, new = versions

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    folders.save(old, tmp_path / 'old')
    for part in ('save_file', 'write_json'):  # the first file that is written, and the last
        with monkeypatch.context() as m:
            m.setattr(folders, part, full)
            for n in ('new', 'old'):
                with pytest.raises(OSError):
                    folders.save(new, tmp_path / n)
        with pytest.raises(TinyclipError, match='There is no model folder'):
            zoo.load(tmp_path / 'new')
        assert which(tmp_path / 'old', versions) == 0
    assert [p.name for p in tmp_path.iterdir()] == ['old'] and len(
        list((tmp_path / 'old').iterdir())
    ) == 4


@pytest.mark.parametrize('stop', range(9))
def test_a_save_that_breaks_off_between_two_files_leaves_no_mixture(
    versions, tmp_path, monkeypatch, stop
):
    "Four files go, four come; stopped anywhere in between, there is no model"
    old, new = versions
    folder, done = folders.save(old, tmp_path / 'm'), []
    (folder / 'README.md').write_text('mine')

    def stopping(f):
        def step(self, *args, **kwargs):
            if folder in (self.parent, *(Path(a).parent for a in args)):
                if len(done) == stop:
                    raise KeyboardInterrupt
                done.append(self.name)
            return f(self, *args, **kwargs)

        return step

    with monkeypatch.context() as m:
        for n in ('unlink', 'replace'):
            m.setattr(Path, n, stopping(getattr(Path, n)))
        if stop == 8:
            folders.save(new, folder)
        else:
            with pytest.raises(KeyboardInterrupt):
                folders.save(new, folder)
    assert (
        len(done) == stop
        and [p.name for p in tmp_path.iterdir()] == ['m']
        and not list(folder.glob('.*'))
    )
    assert (folder / 'README.md').read_text() == 'mine'
    if stop in (0, 8):
        assert which(folder, versions) == stop // 8
    else:
        with pytest.raises(TinyclipError, match='holds no model'):
            zoo.load(folder)


def test_what_belonged_to_an_older_model_goes(versions, tmp_path):
    folder = folders.save(versions[0], tmp_path / 'm')
    assert {KEEP, BPE} <= {p.name for p in folder.iterdir()}
    plain = build(CFG).eval()
    folders.save(plain, folder)
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS} and torch.equal(
        zoo.load(folder).model.visual.proj, plain.visual.proj
    )


class Words:
    "A Hugging Face tokenizer, as far as saving goes"

    def __init__(self, text):
        self.text = text

    def save_pretrained(self, folder):
        for n in ('tokenizer.json', 'templates/chat.txt'):
            path = Path(folder) / n
            path.parent.mkdir(exist_ok=True)
            path.write_text(self.text)
        if self.text == 'broken':
            raise OSError('disk full')


def test_the_files_of_a_tokenizer_come_along(tmp_path):
    model = student()
    model.tokenizer_cfg = dict(hf_tokenizer_name='some/tokenizer')
    with pytest.raises(TinyclipError, match='tokenizer=tokenizer'):
        folders.save(model, tmp_path / 'm')
    assert not list(tmp_path.iterdir())
    for text, want in (('first', 'first'), ('second', 'second'), ('broken', 'second')):
        if text == 'broken':
            with pytest.raises(OSError):
                folders.save(model, tmp_path / 'm', tokenizer=Words(text))
        else:
            folders.save(model, tmp_path / 'm', tokenizer=Words(text))
        files = {
            str(p.relative_to(tmp_path / 'm')): p
            for p in (tmp_path / 'm').rglob('*')
            if p.is_file()
        }
        assert (
            set(files) == {CONFIG, WEIGHTS, KEEP, 'tokenizer.json', 'templates/chat.txt'}
            and files['templates/chat.txt'].read_text()
            == files['tokenizer.json'].read_text()
            == want
        )
        assert (
            json.loads(files[CONFIG].read_text())['model_cfg']['text_cfg']['hf_tokenizer_name']
            == 'some/tokenizer'
        )


def test_replacing_folders_of_every_kind(tmp_path, monkeypatch):
    """New, below folders that are not there, the working folder, a link; everyone may read what
    comes, whatever the mask"""
    (tmp_path / 'there').mkdir()
    (tmp_path / 'here').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'there')
    monkeypatch.chdir(tmp_path / 'here')
    mask = os.umask(0o077)
    try:
        for folder in (
            tmp_path / 'new',
            tmp_path / 'a' / 'b',
            Path('.'),
            'name',
            tmp_path / 'link',
        ):
            for text in ('1', '2'):
                with folders.replacing(folder, ('sign', 'rest')) as tmp:
                    assert not list(tmp.iterdir()) and tmp.stat().st_dev == tmp_path.stat().st_dev
                    (tmp / 'sign').write_text(text)
                    if text == '1':
                        (tmp / 'rest').write_text(text)
            assert {p.name: p.read_text() for p in Path(folder).iterdir() if p.is_file()} == {
                'sign': '2'
            } and (Path(folder) / 'sign').stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)
    assert (tmp_path / 'new').stat().st_mode & 0o777 == 0o755 and (tmp_path / 'link').is_symlink()
    for folder in (tmp_path / 'new' / 'sign', tmp_path / 'new' / 'sign' / 'below' / 'it'):
        with pytest.raises(TinyclipError, match="sign' is a file"):
            folders.save(student(), folder)
    assert not list(tmp_path.rglob('*.tmp'))


@pytest.fixture
def server(tmp_path):
    "Serves files of a folder slowly, with ranges; counts the bytes it was asked for"
    root, asked = tmp_path / 'server', []
    root.mkdir()

    class Handler(BaseHTTPRequestHandler):
        pause = 0

        def do_GET(self):
            path = root / self.path.lstrip('/')
            if not path.is_file():
                return self.send_error(404)
            data, start = path.read_bytes(), 0
            if 'Range' in self.headers:
                start = int(self.headers['Range'][6:-1])
            self.send_response(206 if start else 200)
            if start:
                self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
            self.send_header('Content-Length', str(len(data) - start))
            self.send_header('ETag', '"1"')
            self.end_headers()
            asked.append(start)
            try:
                for i in range(start, len(data), 50_000):
                    self.wfile.write(data[i : i + 50_000])
                    self.wfile.flush()
                    threading.Event().wait(Handler.pause)
            except OSError:
                pass  # the other side is gone

        def log_message(self, *a):
            pass

    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    s.root = root
    s.asked = asked
    s.handler = Handler
    s.url = f'http://127.0.0.1:{s.server_port}'
    yield s
    s.shutdown()


def test_a_killed_download_goes_on(server, tmp_path, monkeypatch):
    "kill -9 in the middle: no file; the next load fetches the rest and loads"
    name = 'TinyCLIP-ViT-8M-16-Text-3M-YFCC15M'
    torch.manual_seed(0)
    state = build({**config('TinyCLIP-ViT-8M-16-Text-3M')}).half().state_dict()
    torch.save(
        dict(epoch=1, state_dict={f'module.{k}': v for k, v in state.items()}),
        server.root / f'{name}.pt',
    )
    size = (server.root / f'{name}.pt').stat().st_size
    server.handler.pause = 0.01
    cache = tmp_path / 'cache'
    child = subprocess.Popen(
        [
            sys.executable,
            '-c',
            f'from tinyclip.zoo.download import download; download("{server.url}/{name}.pt", '
            f'r"{cache}/{name}.pt", progress=False)',
        ]
    )
    part = cache / f'{name}.pt.part'
    for _ in range(3000):
        if part.is_file() and part.stat().st_size > 2_000_000:
            break
        threading.Event().wait(0.02)
    child.kill()
    child.wait()
    got = part.stat().st_size
    assert 0 < got < size and not (cache / f'{name}.pt').exists()
    server.handler.pause = 0
    monkeypatch.setenv('TINYCLIP_CACHE', str(cache))
    monkeypatch.setattr(
        'tinyclip.zoo.released.released',
        lambda: {name: {**released()[name], 'url': f'{server.url}/{name}.pt'}},
    )
    model = zoo.load(name).model
    assert server.asked[-1] == got and not part.exists()
    assert torch.equal(model.visual.proj, state['visual.proj'].float())
    n = len(server.asked)
    zoo.load(name)
    assert len(server.asked) == n  # once is enough


def test_an_auto_inherited_model_by_name(tmp_path, monkeypatch):
    """A stand-in of the released size and layout, made of a random ViT-B/32: head size, patch
    and activation are not in the file"""
    name = 'TinyCLIP-auto-ViT-22M-32-Text-10M-LAION400M'
    torch.manual_seed(0)
    teacher = build(config('ViT-B-32')).eval()
    keep = {
        'image.width': 384,
        'text.width': 300,
        **{f'image.layers.{i}.heads': [4, 6, 0, 9][i % 4] or [] for i in range(12)},
        **{f'text.layers.{i}.ffn': [700, 0, 900][i % 3] or [] for i in range(12)},
    }
    student = inherit(teacher, choose(teacher, keep))

    def tower(k):
        return (
            '_image_encoder.'
            if k.startswith('visual.')
            else '_logit_scale.'
            if k.startswith('logit')
            else '_text_encoder.'
        )

    def dropped(k):
        # the released code drops these biases, too
        return (
            k.endswith(('attn.out_proj.bias', 'mlp.c_proj.bias'))
            and k.replace('.bias', '.weight') not in student.state_dict()
        )

    state = {
        f'{tower(k)}module.{k}': v.half() for k, v in student.state_dict().items() if not dropped(k)
    }
    torch.save(dict(epoch=6, name=name, state_dict=state), tmp_path / f'{name}.pt')
    monkeypatch.setenv('TINYCLIP_CACHE', str(tmp_path))
    model, preprocess, tokenizer = zoo.load(name)
    for k, v in student.state_dict().items():
        if dropped(k):
            student.get_parameter(k).data.zero_()
        else:
            v.copy_(v.half())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.encode_image(x), student.encode_image(x))
        assert torch.equal(
            model.encode_text(tokenizer(['a photo of a cat'])),
            student.encode_text(tokenizer(['a photo of a cat'])),
        )
    assert tokenizer.context_length == 77 and tuple(
        preprocess(Image.new('RGB', (300, 200))).shape
    ) == (3, 224, 224)


def test_a_damaged_download_says_so(server, tmp_path, monkeypatch):
    name = 'TinyCLIP-ViT-8M-16-Text-3M-YFCC15M'
    (server.root / 'x.pt').write_bytes(b'<html>Sign in</html>' * 100)
    monkeypatch.setenv('TINYCLIP_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(
        'tinyclip.zoo.released.released',
        lambda: {name: {**released()[name], 'url': f'{server.url}/x.pt'}},
    )
    with pytest.raises(TinyclipError, match='Delete .* to have it downloaded again'):
        zoo.load(name)


def test_many_at_once(server, tmp_path):
    "Four processes that want the same file fetch it once"
    (server.root / 'x.bin').write_bytes(os.urandom(300_000))
    code = (
        f'from tinyclip.zoo.download import download; download("{server.url}/x.bin", '
        f'r"{tmp_path}/x.bin", progress=False)'
    )
    for p in [subprocess.Popen([sys.executable, '-c', code]) for _ in range(3)]:
        assert p.wait() == 0
    assert (
        server.asked == [0]
        and (tmp_path / 'x.bin').read_bytes() == (server.root / 'x.bin').read_bytes()
    )


def test_no_server(tmp_path):
    with pytest.raises(TinyclipError, match='could not be downloaded'):
        download('http://127.0.0.1:9/x', tmp_path / 'x', progress=False, tries=1)
