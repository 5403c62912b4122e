"""Learned maps beside manual inheritance and its reconstruction: every weight of the student is
`L W R`, with maps that begin at manual inheritance, are trained for a while and then folded, after
which the student trains as any other. Same pairs, same loss, same number of samples for all.

    # writes results/learned-maps-cifar10/run.json
    python benchmarks/learned_maps.py --shared ../shared

Learning rates and the share of map steps are chosen for the first share of the list, in a third of
the steps, on training photographs that nobody trains on. Finished runs are kept below runs/ and
not repeated.
"""

import argparse
import copy
import itertools
import re
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from methods import row_of, same_recipe
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyclip.core import Table, autocast, evaluating, record_run
from tinyclip.data import open_pairs, transforms
from tinyclip.data.cached import CachedBatch
from tinyclip.data.pairs import labelled
from tinyclip.distill import Distiller
from tinyclip.evaluate import prompts, zero_shot
from tinyclip.inheritance import inherit
from tinyclip.keep import keep_for_size
from tinyclip.reconstruction import reconstruct
from tinyclip.towers import layout
from tinyclip.train.step import features
from tinyclip.zoo import load
from tinyclip.zoo.vocabulary import shorten


def without_kind(name):
    "Name of a tensor without its last word: weight and bias of a layer share their map"
    return name.removesuffix('weight').removesuffix('bias')


def selection(rows, size, copies=1):
    "Matrices `(copies, rows/copies, size/copies)` that pick rows, those of each copy from its own"
    rows = rows.view(copies, -1) - torch.arange(copies)[:, None] * (size // copies)
    return nn.functional.one_hot(rows, size // copies).float()


class LearnedMaps(nn.Module):
    """A student whose weights are linear maps of its teacher's: over channels, neurons and heads on
    both sides of every matrix, and over the layers of a tower, which must all have the same shapes.
    As built it is the inherited student; `fold` makes an ordinary model of it."""

    def __init__(self, teacher, keep):
        super().__init__()
        l = layout(teacher)
        self.clip = inherit(teacher, keep)
        self.names = [n for n, _ in self.clip.named_parameters() if not n.startswith('logit_')]
        for name, p in self.clip.named_parameters():
            p.requires_grad_(name not in self.names)
        self.sources, self.dims, self.parts = {}, {}, defaultdict(list)
        self.maps = nn.ParameterDict()
        whole = {n: p.detach() for n, p in teacher.named_parameters()}
        for name in self.names:
            path, i, rest = self._place(name, l)
            first = name
            if path:
                axis = next(a for a, p in l.depth.items() if p == path)
                first = f'{path}.{keep[axis][i]}.{rest}'
                self.parts[path, rest].append((i, name))
                layers = range(l.sizes[axis])
                self.sources[path, rest] = torch.stack(
                    [whole[f'{path}.{j}.{rest}'] for j in layers]
                )
                self._add(
                    f'{path}.*.{without_kind(rest)}',
                    selection(torch.tensor(keep[axis]), len(layers)),
                )
            else:
                self.sources[name] = whole[name].clone()
            self.dims[name] = [(d, k) for k, d in enumerate(l.dims[first]) if d]
            for d, k in self.dims[name]:
                kept = torch.tensor(keep[d.axis], dtype=torch.long)
                rows = d.expand(kept, l.sizes[d.axis])
                size = whole[first].shape[k]
                self._add(f'{without_kind(name)}@{k}', selection(rows, size, d.copies))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'clip':
                raise
            return getattr(self.clip, name)

    @staticmethod
    def _place(name, l):
        "(path of the blocks, number, rest of the name); without a path outside blocks"
        for path in l.depth.values():
            if name.startswith(path + '.'):
                i, rest = name[len(path) + 1 :].split('.', 1)
                return path, int(i), rest
        return None, None, name

    def _add(self, name, value):
        key = name.replace('.', '/')
        if key not in self.maps:
            self.maps[key] = nn.Parameter(value)

    def weights(self):
        "The student's weights, by name"
        out = {n: t for n, t in self.sources.items() if isinstance(n, str)}
        for (path, rest), names in self.parts.items():
            depth = self.maps[f'{path}.*.{without_kind(rest)}'.replace('.', '/')][0]
            stack = self.sources[path, rest]
            mixed = (depth @ stack.flatten(1)).view(-1, *stack.shape[1:])
            out |= {name: mixed[i] for i, name in names}
        return {n: self._mapped(n, out[n]) for n in self.names}

    def _mapped(self, name, t):
        for d, k in self.dims[name]:
            m, t = self.maps[f'{without_kind(name)}@{k}'.replace('.', '/')], t.movedim(k, 0)
            rows = m @ t.reshape(d.copies, m.shape[2], -1)
            t = rows.reshape(-1, *t.shape[1:]).movedim(0, k)
        return t

    def forward(self, image=None, text=None):
        with torch.autocast('cpu', enabled=False):  # the fold, too, is in float32
            weights = self.weights()
        return functional_call(self.clip, weights, (image, text))

    def fold(self):
        "The student that the maps stand for"
        self.clip.load_state_dict(self.weights(), strict=False)
        return self.clip.requires_grad_(True).eval()


class Batches:
    "Pairs with the teacher's features in memory: the same batches for every method of a seed"

    teacher = dict(teacher='in memory')

    def __init__(self, pairs, teacher, count):
        start = time.process_time()
        self.batches = []
        for image, text in itertools.islice(pairs.epoch(0), count):
            with evaluating(teacher), autocast('cpu', 'auto'):
                f = features(teacher, image, text)
            self.batches.append(CachedBatch(image, text, f.image, f.text, f.scale))
        self.seconds = time.process_time() - start

    def epoch(self, epoch, start=0):
        return iter(self.batches[start:])

    def part(self, start, stop=None):
        new = copy.copy(self)
        new.batches = self.batches[start:stop]
        return new

    def __len__(self):
        return len(self.batches)


class Timed:
    "A test whose own processor time can be taken off"

    def __init__(self, tokenizer, source, preprocess, count):
        images = labelled(source, preprocess, 250)
        self.batches = list(itertools.islice(images, count // 250))
        self.settings = tokenizer, self.batches, images.classnames
        self.seconds = 0.0

    def __call__(self, model):
        start = time.process_time()
        top1 = zero_shot(model, *self.settings, precision='auto')['top1']
        self.seconds += time.process_time() - start
        return top1


def train(student, batches, lr, seed, decay=0.1):
    "Distil once through the batches, with a warm-up and a cosine of their own"
    settings = dict(objective='affinity', warmup=0.1, device='cpu', progress=False, log_every=10**6)
    run = Distiller(student, None, batches, lr=lr, weight_decay=decay, seed=seed, **settings)
    with sdpa_kernel(SDPBackend.MATH):  # for 65 tokens in bfloat16, a third of the time of a step
        return run.fit(len(batches)).student


def manual(teacher, keep, batches, plan):
    return inherit(teacher, keep), batches


def reconstructed(teacher, keep, batches, plan):
    "The calibration pairs are the first batches, and count"
    n = plan['calibration']
    pairs = [(b.image, b.text) for b in batches.batches[:n]]
    samples = sum(len(image) for image, _ in pairs)
    student = reconstruct(inherit(teacher, keep), teacher, pairs, samples, progress=False)
    return student, batches.part(n)


def maps(teacher, keep, batches, plan):
    "Train the maps and fold"
    n = round(plan['map_share'] * len(batches))
    learned = LearnedMaps(teacher, keep)
    train(learned, batches.part(0, n), plan['map_lr'], plan['seed'], decay=0.0)
    return learned.fold(), batches.part(n)


METHODS = {f.__name__: f for f in (manual, reconstructed, maps)}


def one(teacher, share, method, seed, plan, batches, test):
    "A student before and after its plain training; a row"
    start, tested = time.process_time(), test.seconds
    keep = keep_for_size(teacher, share)
    student, rest = METHODS[method](teacher, keep, batches, plan | dict(seed=seed))
    before = test(student)
    top1 = test(train(student, rest, plan['lr'], seed))
    seconds = time.process_time() - start - (test.seconds - tested)
    row = dict(share=share, method=method, seed=seed, plan=plan, before=before, top1=top1)
    return row | dict(seconds=seconds, shared_seconds=batches.seconds)


GRID = (2.5e-5, 1e-4, 4e-4, 1.6e-3)
# where each method starts, and its settings with their values, chosen one after the other
SEARCH = dict(
    manual=(dict(), dict(lr=GRID)),
    reconstructed=(dict(calibration=6), dict(lr=GRID)),
    maps=(dict(map_share=0.25), dict(map_lr=GRID, map_share=(0.25, 0.5), lr=GRID)),
)


def search(run):
    "For every method the plan that is best on held-out photographs, and all rows behind that"
    best, rows = {}, {}
    for method, (start, settings) in SEARCH.items():
        plan = dict(lr=best['manual']['lr']) | start if best else dict(start)
        for name, values in settings.items():
            tried = [run(method, plan | {name: v}) for v in values]
            rows |= {repr((method, r['plan'])): r for r in tried}
            plan = max(tried, key=lambda r: r['top1'])['plan']
        best[method] = plan
    return best, [*rows.values()]


def table(rows):
    "Mean and spread over seeds, before and after the plain training"
    out, of = Table(), lambda r: (r['share'], r['method'])
    for key in dict.fromkeys(map(of, rows)):
        same = [r for r in rows if of(r) == key]
        seen = {n: [100 * r[n] for r in same] for n in ('before', 'top1')}
        text = {
            n: f'{statistics.mean(v):.1f} +- {statistics.stdev(v):.1f}' for n, v in seen.items()
        }
        seconds = statistics.mean(r['seconds'] for r in same)
        out.append(dict(zip(('share', 'method'), key)) | text | dict(seconds=f'{seconds:.0f}'))
    return out


class Bench:
    "Teacher, batches and tests; runs that are kept in a folder"

    def __init__(self, shared, folder):
        data, self.folder = f'{shared}/data/cifar10', folder
        teacher, preprocess, tokenizer = load(f'{shared}/teachers/cifar10')
        names = labelled(f'{data}/val-0000.tar', preprocess).classnames
        captions = [p for n in names for p in prompts(n)]
        # these are all captions there are: the rows of other tokens would only cost time
        self.teacher, self.tokenizer = shorten(teacher, captions, tokenizer)
        self.source = f'{data}/train-{{0000..0006}}.tar'
        self.test = Timed(self.tokenizer, f'{data}/val-0000.tar', preprocess, 2000)
        self.held_out = Timed(self.tokenizer, f'{data}/train-0007.tar', preprocess, 1000)
        self.batches = {}

    def drawn(self, seed, steps):
        if (seed, steps) not in self.batches:
            transform = transforms(self.teacher)[0]
            pairs = open_pairs(self.source, transform, self.tokenizer, 64, seed=seed)
            self.batches = {(seed, steps): Batches(pairs, self.teacher, steps)}
        return self.batches[seed, steps]

    def run(self, share, method, seed, plan, steps, test):
        def make():
            return one(self.teacher, share, method, seed, plan, self.drawn(seed, steps), test)

        name = '-'.join(map(str, (share, method, seed, steps, *sorted(plan.items()))))
        row = row_of(self.folder / re.sub('[^a-z0-9._-]+', '-', name), make)
        shown = ('share', 'method', 'seed', 'plan', 'before', 'top1', 'seconds')
        print({k: row[k] for k in shown}, flush=True)
        return row

    def search(self, share, seed, steps):
        return search(lambda m, plan: self.run(share, m, seed, plan, steps, self.held_out))


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--shared', default='../shared')
    p.add_argument('--steps', type=int, default=120)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--shares', type=float, nargs='+', default=[0.25, 0.5])
    p.add_argument('--search-seed', type=int, default=100)
    p.add_argument('--work', type=Path, default=Path('runs/learned-maps'))
    a = p.parse_args()
    recipe = dict(data='cifar10', batch_size=64, steps=a.steps, search_steps=a.steps // 3)
    same_recipe(a.work, recipe)
    bench, rows = Bench(a.shared, a.work), []
    best, searched = bench.search(a.shares[0], a.search_seed, a.steps // 3)
    for seed in a.seeds:
        for share in a.shares:
            for method, plan in best.items():
                rows.append(bench.run(share, method, seed, plan, a.steps, bench.test))
    recipe |= dict(search=searched, best=best, teacher=bench.test(bench.teacher))
    print(table(rows), record_run('learned-maps-cifar10', recipe, rows, a.seeds))
