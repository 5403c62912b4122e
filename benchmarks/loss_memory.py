"""What a large batch costs in the loss: whole tables (plain torch), open_clip's DistillClipLoss,
and tiles. Forward and backward, float32, side by side.

    python benchmarks/loss_memory.py     # writes results/loss-memory/run.json
                                         # (with a GPU: results/loss-memory-cuda)

    # of each batch, the rows that one of 128 processes takes; tiles only
    python benchmarks/loss_memory.py --sizes 32768 131072 --share 128
"""

import argparse
import statistics

import torch
from open_clip.loss import DistillClipLoss
from torch.nn import functional as F

from tinyclip.core import Table, pick_device, record_run, seed_everything
from tinyclip.evaluate.cost import peak_memory, seconds
from tinyclip.losses import affinity_mimicking, contrastive
from tinyclip.losses.distributed import local_rows
from tinyclip.losses.tiled import tile_size, tiled_cross_entropy


def pairs(n, width, device):
    """Unit rows of images and of the texts that belong to them: cosines of about .24 in a pair
    and 0 elsewhere"""

    def unit():
        return F.normalize(torch.randn(n, width, device=device), dim=-1)

    image = unit()
    return image, F.normalize(image + 4 * unit(), dim=-1)


def affinity(x, scale, tile):
    return sum(affinity_mimicking(*x, scale, 50.0, tile=tile))


def both(x, scale, tile):
    # what open_clip's adds up to
    return sum(affinity_mimicking(*x, scale, 50.0, tile=tile)) / 2 + contrastive(
        *x[:2], scale, tile=tile
    )


def theirs(x, scale, tile):
    return sum(DistillClipLoss()(*x[:2], scale, *x[2:], torch.tensor(50.0, device=scale.device)))


def some(x, scale, tile, processes):
    own = local_rows(len(x[0]), 0, processes)
    return sum(
        v.mean() for v in tiled_cross_entropy(x[0][own], x[1], x[2][own], x[3], scale, 50.0, tile)
    )


def setting(n, width, device, kind=torch.float32):
    seed_everything(0)
    x = [v.to(kind) for m in range(2) for v in pairs(n, width, device)]
    return [v.requires_grad_(i < 2) for i, v in enumerate(x)], torch.tensor(
        50.0, device=device, dtype=kind, requires_grad=True
    )


def error(loss, tile, n, width, device):
    """How far the gradients of tiles in float32 are from those of whole tables in float64,
    relative to their norms: the worst of images, texts and scale"""
    x, s = setting(n, width, device)
    loss(x, s, tile).backward()
    y = [v.detach().double().requires_grad_(v.requires_grad) for v in x]
    t = s.detach().double().requires_grad_()
    loss(y, t, None).backward()
    return max(
        ((a.grad.double() - b.grad).norm() / b.grad.norm()).item()
        for a, b in ((x[0], y[0]), (x[1], y[1]), (s, t))
    )


def measure(name, ways, n, a, device):
    "Median seconds over alternating rounds, and peak memory, of each way"
    x, s = setting(n, a.width, device)

    def run(way):
        for v in (*x, s):
            v.grad = None
        loss, tile = ways[way]
        loss(x, s, tile).backward()

    for way in ways:
        run(way) if n <= 4096 else None
    rounds = a.rounds if len(ways) > 1 else 1
    times, peaks = {w: [] for w in ways}, {}
    for i in range(rounds):
        for w in ways:

            def once():
                return times[w].append(seconds(lambda _: run(w), s))

            if i:
                once()
                continue
            for v in (*x, s):
                v.grad = None
            peaks[w] = peak_memory(once, device)
    out = dict(loss=name, batch=n) | {
        f'{w}_s': round(statistics.median(t), 3) for w, t in times.items()
    }
    if 'whole' in ways:
        out['tiled_over_whole'] = round(
            statistics.median(p / q for p, q in zip(times['tiled'], times['whole'])), 2
        )
    return out | {f'{w}_gb': None if p is None else round(p / 1e9, 3) for w, p in peaks.items()}


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--sizes', type=int, nargs='+', default=[1024, 2048, 4096, 8192, 16384])
    p.add_argument('--width', type=int, default=512)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument(
        '--tile',
        type=int,
        default=None,
        help='of so many rows and columns (default: the one tinyclip takes)',
    )
    p.add_argument(
        '--limit',
        type=float,
        default=5.0,
        help='whole tables only where they are expected to take no more gigabytes',
    )
    p.add_argument(
        '--threads',
        type=int,
        default=1,
        help='on a CPU; several spin while they wait, which is processor time, too',
    )
    p.add_argument(
        '--share', type=int, default=None, help='only the rows of one of so many processes'
    )
    p.add_argument('--name', default='loss-memory', help='folder in results/')
    a = p.parse_args()
    device = pick_device(None).type
    torch.set_num_threads(a.threads)
    tile = a.tile or tile_size(2**20, 2**20, device=device)
    rows = Table()
    for n in a.sizes:
        holds = 16 * 4 * n * n / 1e9 <= a.limit
        for name, loss, more in (
            ('affinity', affinity, {}),
            ('affinity + contrastive', both, dict(open_clip=(theirs, None))),
        ):
            if a.share and loss is both:
                continue
            if a.share:
                ways = dict(tiled=(lambda *b: some(*b, a.share), tile))
            else:
                ways = (more | dict(whole=(loss, None)) if holds else {}) | dict(tiled=(loss, tile))
            row = measure(name, ways, n, a, device)
            if not a.share and n <= 2048:
                row['gradient_error'] = float(f'{error(loss, tile, n, a.width, device):.1e}')
            known = [r for r in rows if r['loss'] == name and r.get('whole_gb')]
            if known and not holds:
                # tables grow with the square
                row['whole_gb_expected'] = round(
                    known[-1]['whole_gb'] * (n / known[-1]['batch']) ** 2, 1
                )
            rows.append(row)
            print(row, flush=True)
    print(rows)
    recipe = dict(
        sizes=a.sizes,
        width=a.width,
        rounds=a.rounds,
        tile=tile,
        threads=a.threads,
        clock='events' if device == 'cuda' else 'processor time',
        share=a.share,
        precision='fp32',
        student_scale='learned, 50',
        teacher_scale=50,
    )
    print(record_run(a.name + ('-cuda' if device == 'cuda' else ''), recipe, list(rows), [0]))
